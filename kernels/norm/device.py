"""RMSNorm in registers: the device function that kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.quant.device import inverse_power_of_two, scale_exponent, store_scales


@triton.jit
def norm_row(
    row,  # int64
    x,  # [rows, dim]
    weight,  # float32 [dim], with HAS_WEIGHT
    out,  # [rows, dim], of x's dtype or E4M3
    exponents,  # uint8 [rows, dim / 128], with QUANTIZE
    scales,  # of `store_scales`, with QUANTIZE
    dim,
    x_row,
    row_step,
    group_step,
    eps,
    HAS_WEIGHT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    GROUPS: tl.constexpr,  # of 128 values, a power of two
):
    """RMSNorm of one row, and its E4M3."""
    group = tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < dim
    loaded = tl.load(x + row * x_row + column, mask=inside, other=0.0)
    values = loaded.to(tl.float32)
    values = values * (1.0 / tl.sqrt(tl.sum(tl.sum(values * values, axis=1)) / dim + eps))
    if HAS_WEIGHT:
        values = values * tl.load(weight + column, mask=inside, other=0.0)
    values = values.to(loaded.dtype)
    if QUANTIZE:
        values = values.to(tl.float32)
        exponent = scale_exponent(values, 1, FP4=False)
        values = values * inverse_power_of_two(exponent)[:, None]
        store_scales(exponents, scales, row * row_step + group * group_step, exponent, group * 128 < dim)
    tl.store(out + row * dim + column, values.to(out.dtype.element_ty), mask=inside)
