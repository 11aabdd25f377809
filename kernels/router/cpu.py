"""Expert routing in C: float32, `gate_weight` column by column."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import cpu


def route(
    x: Tensor,
    gate_weight: Tensor,
    *,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    token_ids: Tensor,
    top_k: int,
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    """See reference.py."""
    if not cpu.fits(x, gate_weight) or not (x.is_contiguous() and cpu.by_column(gate_weight)):
        return None
    if not (token_ids.is_contiguous() and (tid2eid is None or tid2eid.is_contiguous())):
        return None
    (num_tokens, hidden_size), num_experts = x.shape, gate_weight.shape[0]
    scores, weights = x.new_empty(num_tokens, num_experts), x.new_empty(num_tokens, top_k)
    expert_ids = torch.empty_like(weights, dtype=torch.int64)
    cpu.library.dsv4_route(
        x.data_ptr(),
        gate_weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if tid2eid is None else tid2eid.data_ptr(),
        token_ids.data_ptr(),
        scores.data_ptr(),
        weights.data_ptr(),
        expert_ids.data_ptr(),
        num_tokens,
        num_experts,
        hidden_size,
        top_k,
        scale,
    )
    return weights, expert_ids
