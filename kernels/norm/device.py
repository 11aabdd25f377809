"""RMSNorm in registers: the device function that kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.quant.device import inverse_power_of_two, scale_exponent, store_scales


@triton.jit
def norm_rows(
    row,  # int64 [n]
    num_rows,  # those from here on are none
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
    """RMSNorm of n rows, and their E4M3."""
    group = tl.arange(0, GROUPS)
    column = group[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    inside = (column < dim) & (row < num_rows)[:, None, None]
    loaded = tl.load(x + (row * x_row)[:, None, None] + column, mask=inside, other=0.0)
    values = loaded.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(values * values, axis=2), axis=1) / dim + eps)
    values = values * inverse[:, None, None]
    if HAS_WEIGHT:
        values = values * tl.load(weight + column, mask=column < dim, other=0.0)
    values = values.to(loaded.dtype)
    if QUANTIZE:
        values = values.to(tl.float32)
        exponent = scale_exponent(values, 2, FP4=False)
        values = values * inverse_power_of_two(exponent)[:, :, None]
        at = (row * row_step)[:, None] + group[None, :] * group_step
        store_scales(exponents, scales, at, exponent, (group * 128 < dim)[None, :] & (row < num_rows)[:, None])
    tl.store(out + (row * dim)[:, None, None] + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_row(
    row,  # int64
    x,
    weight,
    out,
    exponents,
    scales,
    dim,
    x_row,
    row_step,
    group_step,
    eps,
    HAS_WEIGHT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """`norm_rows` of one."""
    norm_rows(
        row + tl.zeros([1], tl.int64), row + 1, x, weight, out, exponents, scales, dim, x_row, row_step, group_step,
        eps, HAS_WEIGHT, QUANTIZE, GROUPS,
    )  # fmt: skip
