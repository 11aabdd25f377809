"""Grouped output projection in C: float32, weights that lie column by column, bfloat16 too."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import cpu


def grouped_out_proj(o: Tensor, wo_a: Tensor, wo_b: Tensor, *, quantize: bool) -> Tensor | None:
    """See reference.py."""
    dtype = cpu.weight_dtype(wo_a, wo_b)
    if quantize or dtype is None or not cpu.fits(o) or not (o.is_contiguous() and cpu.by_column(wo_a, wo_b)):
        return None
    num_rows, (num_groups, rank, width), num_columns = o.shape[0], wo_a.shape, wo_b.shape[0]
    low, out = o.new_empty(num_rows, num_groups * rank), o.new_empty(num_rows, num_columns)
    cpu.library.dsv4_grouped_out_proj(
        o.data_ptr(),
        wo_a.data_ptr(),
        wo_b.data_ptr(),
        dtype is torch.bfloat16,
        low.data_ptr(),
        out.data_ptr(),
        num_rows,
        num_groups,
        width,
        rank,
        num_columns,
    )
    return out
