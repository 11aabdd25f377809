"""Grouped output projection in plain torch (docs/model.md section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.gemm import linear


def grouped_out_proj(o: Tensor, wo_a: Tensor, wo_b: Tensor, *, quantize: bool) -> Tensor:
    """Attention output [T, H, hd] -> [T, D] in o.dtype.

    Args:
        wo_a: float32 or bfloat16 [G, dg, (H / G) * hd]; consecutive heads form a group. Its input is not quantised.
        wo_b: like wo_a [D, G * dg]; its input is E4M3 per 128 when `quantize`.
    """
    num_groups, _, width = wo_a.shape
    grouped = o.float().reshape(o.shape[0], num_groups, width).transpose(0, 1)
    low = torch.bmm(grouped, wo_a.transpose(1, 2).float()).transpose(0, 1).flatten(1).to(o.dtype)
    return linear(low, wo_b, quantize=quantize)
