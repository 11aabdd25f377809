"""Quantisation of activations in Triton, bit-equal to the references; other kernels round their results with it too.

`store_quantized` is the device function that epilogues share. A NaN or an infinity anywhere in a group makes its scale
byte 255 (NaN), as in the reference, so it survives; the codes beside such a scale mean nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 4, 1024  # tile of one program


@triton.jit
def scale_exponents(groups, FP4: tl.constexpr):
    """Biased exponents int32 [rows, groups] of the power-of-two scales of f32 [rows, groups, group].

    The maximum is taken over integers: the bits of magnitudes have their order, and NaN is above all.
    """
    bits = groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if FP4:  # floors of reference.py as bits: 6 * 2^-126 and 1e-4
        amax = tl.maximum(tl.max(bits, axis=2), 0x01C00000).to(tl.float32, bitcast=True) * (1.0 / 6.0)
    else:
        amax = tl.maximum(tl.max(bits, axis=2), 0x38D1B717).to(tl.float32, bitcast=True) * (1.0 / 448.0)
    bits = tl.minimum(amax.to(tl.int32, bitcast=True), 0x7F800000)  # NaN as infinity: its bits must not overflow
    return (bits + 0x7FFFFF) >> 23


@triton.jit
def scaled_groups(groups, exponents):
    """f32 [rows, groups, group] divided by 2^(exponent - 127). The product with the reciprocal is exact."""
    inverse = (tl.maximum(254 - exponents, 0) << 23).to(tl.float32, bitcast=True)
    return groups * inverse[:, :, None]


@triton.jit
def e2m1_codes(values):
    """FP4 codes int32 of f32 values of magnitude up to 6: to nearest, ties to the even code; -0 keeps its sign."""
    size = tl.abs(values)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | ((values.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def e2m1_values(codes):
    """f32 values of FP4 codes: from code 2 on, the three bits are the exponent's and mantissa's low bits of a float."""
    code = codes & 7
    bits = tl.where(code < 2, code * 0x3F000000, (code << 22) + 0x3F000000)
    return (bits | ((codes & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def store_quantized(
    values,  # f32 [rows, columns], columns a power of two
    codes,  # where they go: e4m3 [.., width] or two FP4 a byte [.., width / 2]; not COMPACT: values in any float type
    scales,  # uint8 [.., width / GROUP]; unused if not COMPACT
    row,  # int64 [rows]
    keep,  # bool [rows]
    first,  # number of the first column, a multiple of GROUP
    width,
    GROUP: tl.constexpr,
    FP4: tl.constexpr,
    COMPACT: tl.constexpr,
):
    """Round a tile by group and store it, as codes and scales or as the values they stand for."""
    ROW: tl.constexpr = values.shape[0]
    COLUMN: tl.constexpr = values.shape[1]
    groups = tl.reshape(values, (ROW, COLUMN // GROUP, GROUP))
    exponents = scale_exponents(groups, FP4)
    scaled = scaled_groups(groups, exponents)
    column = first + tl.arange(0, COLUMN)
    at = row[:, None] * width + column[None, :]
    inside = keep[:, None] & (column < width)[None, :]
    if COMPACT:
        group = first // GROUP + tl.arange(0, COLUMN // GROUP)
        num_groups = width // GROUP
        tl.store(
            scales + row[:, None] * num_groups + group[None, :],
            exponents.to(tl.uint8),
            mask=keep[:, None] & (group < num_groups)[None, :],
        )
        if FP4:
            low, high = tl.split(tl.reshape(e2m1_codes(scaled), (ROW, COLUMN // 2, 2)))
            half = first // 2 + tl.arange(0, COLUMN // 2)
            tl.store(
                codes + row[:, None] * (width // 2) + half[None, :],
                (low | (high << 4)).to(tl.uint8),
                mask=keep[:, None] & (half < width // 2)[None, :],
            )
        else:
            tl.store(codes + at, tl.reshape(scaled, (ROW, COLUMN)).to(tl.float8e4nv), mask=inside)
    else:
        rounded = e2m1_values(e2m1_codes(scaled)) if FP4 else scaled.to(tl.float8e4nv).to(tl.float32)
        rounded *= (exponents << 23).to(tl.float32, bitcast=True)[:, :, None]
        tl.store(codes + at, tl.reshape(rounded, (ROW, COLUMN)).to(codes.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize(
    x,  # [rows, width]
    codes,
    scales,
    num_rows,
    width,
    GROUP: tl.constexpr,
    FP4: tl.constexpr,
    COMPACT: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROW + tl.arange(0, ROW)
    first = tl.program_id(1) * COLUMN
    column = first + tl.arange(0, COLUMN)
    keep = row < num_rows
    inside = keep[:, None] & (column < width)[None, :]
    values = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    store_quantized(values, codes, scales, row, keep, first, width, GROUP, FP4, COMPACT)


def _launch(x: Tensor, codes: Tensor, scales: Tensor | None, group: int, fp4: bool) -> None:
    width = x.shape[-1]
    if group not in (32, 64, 128):
        raise ValueError(f"quantize: the group is {group}; the Triton kernels take 32, 64 or 128")
    if width % group:
        raise ValueError(f"quantize: the last dim is {width}; expected a multiple of the group, {group}")
    if not x.is_contiguous():
        raise ValueError(f"quantize: x has strides {x.stride()}; expected a contiguous tensor")
    num_rows = x.numel() // max(width, 1)
    if num_rows:
        _quantize[(triton.cdiv(num_rows, ROWS), triton.cdiv(width, COLUMNS))](
            x,
            codes,
            codes if scales is None else scales,
            num_rows,
            width,
            group,
            fp4,
            scales is not None,
            ROWS,
            COLUMNS,
        )


def quantize_fp8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`reference.quantize_fp8` of a contiguous bfloat16 or float32 x, groups of 32, 64 or 128."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(*x.shape[:-1], x.shape[-1] // group, dtype=torch.uint8, device=x.device)
    _launch(x, codes, scales, group, fp4=False)
    return codes, scales


def quantize_fp4(x: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """`reference.quantize_fp4` of a contiguous bfloat16 or float32 x, groups of 32, 64 or 128."""
    codes = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*x.shape[:-1], x.shape[-1] // group, dtype=torch.uint8, device=x.device)
    _launch(x, codes, scales, group, fp4=True)
    return codes, scales


def fake_quantize_fp8(x: Tensor, group: int) -> Tensor:
    """`reference.fake_quantize_fp8` of a contiguous bfloat16 or float32 x, groups of 32, 64 or 128."""
    rounded = torch.empty_like(x)
    _launch(x, rounded, None, group, fp4=False)
    return rounded


def fake_quantize_fp4(x: Tensor, group: int = 32) -> Tensor:
    """`reference.fake_quantize_fp4` of a contiguous bfloat16 or float32 x, groups of 32, 64 or 128."""
    rounded = torch.empty_like(x)
    _launch(x, rounded, None, group, fp4=True)
    return rounded
