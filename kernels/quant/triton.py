"""Quantisation of activations in Triton, bit-equal to the references; other kernels round their results with it too.

`store_quantized` is the device function that epilogues share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.quant.device import e2m1_bytes, e2m1_codes, e2m1_values, power_of_two, scaled_groups

ROWS, COLUMNS = 4, 1024  # tile of one program


@triton.jit
def store_quantized(
    values,  # f32 [rows, columns], columns a power of two
    codes,  # where they go: e4m3 [.., width] or two FP4 a byte [.., width / 2]; not COMPACT: values in any float type
    scales,  # uint8 [.., width / GROUP], strides scale_row and scale_step; unused if not COMPACT
    row,  # int64 [rows]
    keep,  # bool [rows]
    first,  # number of the first column, a multiple of GROUP
    width,
    scale_row,
    scale_step,
    GROUP: tl.constexpr,
    FP4: tl.constexpr,
    COMPACT: tl.constexpr,
):
    """Round a tile by group and store it, as codes and scales or as the values they stand for."""
    ROW: tl.constexpr = values.shape[0]
    COLUMN: tl.constexpr = values.shape[1]
    scaled, exponents = scaled_groups(values, GROUP, FP4)
    column = first + tl.arange(0, COLUMN)
    at = row[:, None] * width + column[None, :]
    inside = keep[:, None] & (column < width)[None, :]
    if COMPACT:
        group = first // GROUP + tl.arange(0, COLUMN // GROUP)
        tl.store(
            scales + row[:, None] * scale_row + group[None, :] * scale_step,
            exponents.to(tl.uint8),
            mask=keep[:, None] & (group < width // GROUP)[None, :],
        )
        if FP4:
            half = first // 2 + tl.arange(0, COLUMN // 2)
            tl.store(
                codes + row[:, None] * (width // 2) + half[None, :],
                e2m1_bytes(tl.reshape(scaled, (ROW, COLUMN))),
                mask=keep[:, None] & (half < width // 2)[None, :],
            )
        else:
            tl.store(codes + at, tl.reshape(scaled, (ROW, COLUMN)).to(tl.float8e4nv), mask=inside)
    else:
        rounded = e2m1_values(e2m1_codes(scaled)) if FP4 else scaled.to(tl.float8e4nv).to(tl.float32)
        rounded *= power_of_two(exponents)[:, :, None]
        tl.store(codes + at, tl.reshape(rounded, (ROW, COLUMN)).to(codes.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "scale_step"])  # one may be the other
def _quantize(
    x,  # [rows, width], stride x_row
    codes,
    scales,
    num_rows,
    width,
    x_row,
    scale_row,
    scale_step,
    GROUP: tl.constexpr,
    FP4: tl.constexpr,
    COMPACT: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
):
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64) * ROW + tl.arange(0, ROW)
    first = tl.program_id(1) * COLUMN
    column = first + tl.arange(0, COLUMN)
    keep = row < num_rows
    inside = keep[:, None] & (column < width)[None, :]
    values = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    store_quantized(values, codes, scales, row, keep, first, width, scale_row, scale_step, GROUP, FP4, COMPACT)


def launch(x: Tensor, codes: Tensor, scales: Tensor | None, group: int, fp4: bool) -> None:
    """Quantise x [rows, width], a row's columns neighbours, to codes and scales uint8 [rows, width / group].

    Scales may have any strides; without them codes receives the rounded values. Groups are 32, 64 or 128 columns.
    """
    num_rows, width = x.shape
    if group not in (32, 64, 128):
        raise ValueError(f"quantize: the group is {group}; the Triton kernels take 32, 64 or 128")
    if width % group:
        raise ValueError(f"quantize: the last dim is {width}; expected a multiple of the group, {group}")
    if x.stride(1) != 1:
        raise ValueError(f"quantize: x has strides {x.stride()}; expected neighbouring columns")
    if num_rows:
        _quantize[(triton.cdiv(num_rows, ROWS), triton.cdiv(width, COLUMNS))](
            x,
            codes,
            codes if scales is None else scales,
            num_rows,
            width,
            x.stride(0),
            *((0, 0) if scales is None else scales.stride()),
            group,
            fp4,
            scales is not None,
            ROWS,
            COLUMNS,
            launch_pdl=launches_early(x.device),
        )


def _matrix(x: Tensor) -> Tensor:
    """Contiguous x [.., width] as [rows, width]."""
    if not x.is_contiguous():
        raise ValueError(f"quantize: x has strides {x.stride()}; expected a contiguous tensor")
    return x.view(x.numel() // max(x.shape[-1], 1), x.shape[-1])


def quantize_fp8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`reference.quantize_fp8` of a contiguous bfloat16 or float32 x, groups of 32, 64 or 128."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(*x.shape[:-1], x.shape[-1] // group, dtype=torch.uint8, device=x.device)
    launch(_matrix(x), codes, _matrix(scales), group, fp4=False)
    return codes, scales


def quantize_fp4(x: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """`reference.quantize_fp4` of a contiguous bfloat16 or float32 x, groups of 32, 64 or 128."""
    codes = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*x.shape[:-1], x.shape[-1] // group, dtype=torch.uint8, device=x.device)
    launch(_matrix(x), codes, _matrix(scales), group, fp4=True)
    return codes, scales


def fake_quantize_fp8(x: Tensor, group: int) -> Tensor:
    """`reference.fake_quantize_fp8` of a contiguous bfloat16 or float32 x, groups of 32, 64 or 128."""
    rounded = torch.empty_like(x)
    launch(_matrix(x), rounded, None, group, fp4=False)
    return rounded


def fake_quantize_fp4(x: Tensor, group: int = 32) -> Tensor:
    """`reference.fake_quantize_fp4` of a contiguous bfloat16 or float32 x, groups of 32, 64 or 128."""
    rounded = torch.empty_like(x)
    launch(_matrix(x), rounded, None, group, fp4=True)
    return rounded
