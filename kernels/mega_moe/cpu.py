"""The experts of one layer in C: float32, weights that lie column by column, bfloat16 too."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import cpu

ROWS = 64  # of csrc/cpu/gemm.h: rows that pass through an expert together


def mega_moe(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    shared_w13: Tensor,
    shared_w2: Tensor,
    *,
    limit: float,
    activations: str,
    quantize_shared: bool | None = None,
) -> Tensor | None:
    """See reference.py."""
    dtype = cpu.weight_dtype(w13, w2, shared_w13, shared_w2)
    if activations != "bf16" or quantize_shared or expert_ids.dtype is not torch.int64:
        return None
    if dtype is None or not cpu.fits(x, weights):
        return None
    if not (x.is_contiguous() and weights.is_contiguous() and expert_ids.is_contiguous()):
        return None
    if not cpu.by_column(w13, w2, shared_w13, shared_w2):
        return None
    (num_tokens, top_k), (num_experts, hidden_size, width) = expert_ids.shape, w2.shape
    out, work = torch.empty_like(x), x.new_empty(ROWS * (3 * width + hidden_size))
    cpu.library.dsv4_mega_moe(
        x.data_ptr(),
        expert_ids.data_ptr(),
        weights.data_ptr(),
        w13.data_ptr(),
        w2.data_ptr(),
        shared_w13.data_ptr(),
        shared_w2.data_ptr(),
        dtype is torch.bfloat16,
        out.data_ptr(),
        work.data_ptr(),
        num_tokens,
        top_k,
        num_experts,
        hidden_size,
        width,
        limit,
    )
    return out
