"""A token's parts as one row, for who does not add them on the way: ranks whose parts come back, and tests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.dependent import launches_early, wait_for_previous


@triton.jit
def _combine(
    outputs,  # bf16 [tokens, TOP_K, hidden], stride outputs_row
    shared,  # bf16 [tokens, hidden], stride shared_row
    ids,  # [tokens, TOP_K]
    out,  # bf16 [tokens, hidden]
    hidden,
    outputs_row,
    shared_row,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,  # TOP_K padded to a power of two
    BLOCK: tl.constexpr,
):
    """A token's expert outputs in the order of expert ids, then the shared expert, float32, rounded once."""
    wait_for_previous()
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    expert = tl.load(ids + token * TOP_K + lane, mask=lane < TOP_K, other=-1).to(tl.int32)
    count = tl.sum((expert >= 0).to(tl.int32))
    if count == 0:
        return
    key = tl.where(expert < 0, 0x7FFFFFFF, expert)
    before = (key[None, :] < key[:, None]) | ((key[None, :] == key[:, None]) & (lane[None, :] < lane[:, None]))
    place = tl.sum(before.to(tl.int32), axis=1)
    dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = dim < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, count):
        part = outputs + token * outputs_row + tl.sum(tl.where(place == i, lane, 0)) * hidden
        total += tl.load(part + dim, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(shared + token * shared_row + dim, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + dim, total.to(tl.bfloat16), mask=inside)


def combine(outputs: Tensor, shared: Tensor, expert_ids: Tensor) -> Tensor:
    """A token's outputs in the order of its expert ids, then `shared`: added in float32, rounded once, [T, D].

    Args:
        outputs: bfloat16 [T, K, D]; shared: bfloat16 [T, D]; both may be parts of the result of `expert_parts`.
        expert_ids: [T, K], contiguous; outputs of -1 are left out, and rows without any expert are not written.
    """
    num_tokens, top_k, hidden = outputs.shape
    out = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device=shared.device)
    block = min(1024, triton.next_power_of_2(hidden))
    if num_tokens:
        _combine[(num_tokens, triton.cdiv(hidden, block))](
            outputs, shared, expert_ids, out, hidden, outputs.stride(0), shared.stride(0),
            TOP_K=top_k, LANES=triton.next_power_of_2(top_k), BLOCK=block,
            launch_pdl=launches_early(out.device),
        )  # fmt: skip
    return out
