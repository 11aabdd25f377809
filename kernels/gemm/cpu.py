"""Linear layers in C: float32, weights that lie column by column, bfloat16 too."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import cpu


def linear(x: Tensor, weight: Tensor, *, quantize: bool = False, out_dtype: torch.dtype | None = None) -> Tensor | None:
    """See reference.py. `weight` may be some rows of a larger matrix, x some columns."""
    if quantize or x.dim() != 2 or out_dtype not in (None, torch.float32) or not cpu.fits(x):
        return None
    dtype = cpu.weight_dtype(weight)
    (num_rows, depth), (row_step, step), (num_columns, width) = x.shape, x.stride(), weight.shape
    if dtype is None or step != 1 or weight.stride(0) != 1 or width != depth:
        return None
    out = x.new_empty(num_rows, num_columns)
    cpu.library.dsv4_linear(
        x.data_ptr(),
        row_step,
        weight.data_ptr(),
        dtype is torch.bfloat16,
        weight.stride(1),
        out.data_ptr(),
        num_rows,
        num_columns,
        depth,
    )
    return out
