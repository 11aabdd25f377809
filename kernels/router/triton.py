"""Expert routing in Triton: scores in slices of the hidden size, then one program for each token chooses.

Equal to `route` of the reference. Launch 1 (`_logits`) multiplies a tile of experts by a
tile of tokens, a slice of the hidden size each; launch 2 (`_choose`) adds the slices in order, takes the square root of
softplus and the largest.

Accuracy of the logits: a bfloat16 weight (the checkpoint's type) times a bfloat16 x is exact in float32, and only the
sum rounds; a float32 weight is multiplied as three TF32 products. Relative norm of the error against float64 below 1e-5
for both. The choice is exact for given scores, so it differs from the reference's only between experts that are closer
than that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_E = 128  # experts of a tile: rows of the tensor cores


@triton.jit(do_not_specialize=["num_tokens"])
def _logits(
    x,  # [tokens, hidden]
    gate_weight,  # [experts, hidden]
    partials,  # f32 [slices, tokens, experts]
    positions,  # int32 [tokens], -1 = padding
    num_tokens,
    num_experts,
    hidden,
    slice_size,
    HAS_POSITIONS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    token = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(2)
    keep = token < num_tokens
    if HAS_POSITIONS:
        keep = keep & (tl.load(positions + token, mask=keep, other=-1) >= 0)
    real = expert < num_experts
    dim = part * slice_size + tl.arange(0, BLOCK_D)
    weights = gate_weight + expert[:, None] * hidden + dim[None, :]
    inputs = x + token[None, :] * hidden + dim[:, None]
    acc = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    for done in range(0, slice_size, BLOCK_D):
        left = hidden - part * slice_size - done
        inside = tl.arange(0, BLOCK_D) < left
        weight = tl.load(weights, mask=real[:, None] & inside[None, :], other=0.0)
        values = tl.load(inputs, mask=inside[:, None] & keep[None, :], other=0.0)
        if weight.dtype == tl.bfloat16 and values.dtype == tl.bfloat16:
            acc = tl.dot(weight, values, acc)
        else:
            acc = tl.dot(weight.to(tl.float32), values.to(tl.float32), acc, input_precision="tf32x3")
        weights += BLOCK_D
        inputs += BLOCK_D
    at = (part.to(tl.int64) * num_tokens + token[None, :]) * num_experts + expert[:, None]
    tl.store(partials + at, acc, mask=real[:, None] & keep[None, :])


@triton.jit
def _score(logits):
    """Square root of softplus. log(1 + u), u = exp(-|logit|) <= 1, is 2 atanh(u / (2 + u)): a series in s^2 <= 1/9."""
    u = tl.exp(-tl.abs(logits))
    s = u / (2.0 + u)
    square = s * s
    series = 1.0 / 17.0
    for i in tl.static_range(8):
        series = series * square + 1.0 / (15.0 - 2.0 * i)
    return tl.sqrt_rn(tl.where(logits > 0.0, logits, 0.0) + 2.0 * s * series)


@triton.jit(do_not_specialize=["num_tokens", "num_slices"])
def _choose(
    partials,  # f32 [slices, tokens, experts]
    bias,  # f32 [experts], with HAS_BIAS
    tid2eid,  # [vocab, TOP_K], with HASHED
    token_ids,  # [tokens], with HASHED
    positions,  # int32 [tokens], -1 = padding, with HAS_POSITIONS
    weights,  # f32 [tokens, TOP_K]
    expert_ids,  # int64 [tokens, TOP_K]
    scale,
    num_tokens,
    num_experts,
    num_slices,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,  # TOP_K padded to a power of two
    BLOCK: tl.constexpr,  # num_experts padded to a power of two
    HAS_BIAS: tl.constexpr,
    HASHED: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, LANES)
    at = token * TOP_K + choice
    position = tl.load(positions + token) if HAS_POSITIONS else 0
    if position < 0:
        tl.store(expert_ids + at, tl.full([LANES], -1, tl.int64), mask=choice < TOP_K)
        tl.store(weights + at, tl.zeros([LANES], tl.float32), mask=choice < TOP_K)
        return
    expert = tl.arange(0, BLOCK)
    real = expert < num_experts
    logits = tl.zeros([BLOCK], tl.float32)
    row = partials + token * num_experts + expert
    for _ in range(0, num_slices):
        logits += tl.load(row, mask=real, other=0.0)
        row += num_tokens * num_experts
    scores = _score(logits)
    chosen = tl.zeros([LANES], tl.int64)
    picked = tl.zeros([LANES], tl.float32)
    if HASHED:
        chosen = tl.load(tid2eid + tl.load(token_ids + token) * TOP_K + choice, mask=choice < TOP_K, other=-1)
        chosen = chosen.to(tl.int64)
        picked = tl.sum(tl.where(chosen[:, None] == expert[None, :], scores[None, :], 0.0), axis=1)
    else:
        biased = scores + tl.load(bias + expert, mask=real, other=0.0) if HAS_BIAS else scores
        bits = biased.to(tl.int32, bitcast=True)  # in the order of the values, NaN above all as torch sorts it
        keys = tl.where(biased == biased, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
        keys = tl.where(real, keys, -0x80000000)
        for k in tl.static_range(TOP_K):
            best = tl.min(tl.where(keys == tl.max(keys, axis=0), expert, BLOCK), axis=0)
            chosen = tl.where(choice == k, best.to(tl.int64), chosen)
            picked = tl.where(choice == k, tl.sum(tl.where(expert == best, scores, 0.0), axis=0), picked)
            keys = tl.where(expert == best, -0x80000000, keys)
    picked *= scale / tl.sum(picked, axis=0)
    tl.store(expert_ids + at, chosen, mask=choice < TOP_K)
    tl.store(weights + at, picked, mask=choice < TOP_K)


def slice_size(num_tokens: int, hidden: int) -> int:
    """Hidden dims of one program of `_logits`: few tokens make few tiles, so more programs share a dot product."""
    return 256 if num_tokens <= 64 else 1024 if num_tokens <= 1024 else triton.cdiv(hidden, 64) * 64


def route(
    x: Tensor,
    gate_weight: Tensor,
    *,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    token_ids: Tensor,
    top_k: int,
    scale: float,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.route`: weights float32 [T, K] and expert ids int64 [T, K].

    Args:
        x: bfloat16 or float32 [T, D]; gate_weight: bfloat16 or float32 [E, D], E >= top_k. All tensors contiguous.
        bias, tid2eid, token_ids, top_k, scale: as in the reference.
        positions: int32 [T]; rows with -1 are padding, get experts -1 and weights 0, and nothing else of them is read.

    Raises ValueError for anything else.
    """
    (num_tokens, hidden), num_experts = x.shape, gate_weight.shape[0]
    if gate_weight.shape[1] != hidden or top_k > num_experts:
        raise ValueError(
            f"route: x is {list(x.shape)}, gate_weight {list(gate_weight.shape)}, top_k {top_k}; "
            "expected [T, D] and [E, D] with E >= top_k"
        )
    optional = {"bias": bias, "tid2eid": tid2eid, "positions": positions}
    for name, tensor in ({"x": x, "gate_weight": gate_weight, "token_ids": token_ids} | optional).items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"route: {name} has strides {tensor.stride()}; expected a contiguous tensor")
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=x.device)
    expert_ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=x.device)
    if num_tokens == 0:
        return weights, expert_ids
    size = slice_size(num_tokens, hidden)
    num_slices = triton.cdiv(hidden, size)
    partials = torch.empty(num_slices, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    exact = x.dtype is torch.bfloat16 and gate_weight.dtype is torch.bfloat16
    block_t = 16 if num_tokens <= 64 else 64
    _logits[(triton.cdiv(num_experts, BLOCK_E), triton.cdiv(num_tokens, block_t), num_slices)](
        x,
        gate_weight,
        partials,
        expert_ids if positions is None else positions,
        num_tokens,
        num_experts,
        hidden,
        size,
        HAS_POSITIONS=positions is not None,
        BLOCK_E=BLOCK_E,
        BLOCK_T=block_t,
        BLOCK_D=64 if exact else 32,  # three products need more registers (tests/kernels/test_compile_gate.py)
        num_warps=4 if exact else 8,
    )
    _choose[(num_tokens,)](
        partials,
        partials if bias is None else bias,
        expert_ids if tid2eid is None else tid2eid,
        token_ids,
        expert_ids if positions is None else positions,
        weights,
        expert_ids,
        scale,
        num_tokens,
        num_experts,
        num_slices,
        TOP_K=top_k,
        LANES=triton.next_power_of_2(top_k),
        BLOCK=triton.next_power_of_2(num_experts),
        HAS_BIAS=bias is not None,
        HASHED=tid2eid is not None,
        HAS_POSITIONS=positions is not None,
    )
    return weights, expert_ids
