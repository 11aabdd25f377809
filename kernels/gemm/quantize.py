"""E4M3 activations in Triton: the rule of `quantize_fp8(x, 128)` for other kernels, and a launch that quantises."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows

BLOCK_GROUPS = 8  # groups of one program


@triton.jit
def scale_exponent(largest):
    """E8M0 byte, as int32, of the scale of a group with this largest magnitude: 2^ceil(log2(largest / 448))."""
    bits = (tl.maximum(largest, 1e-4) * (1.0 / 448.0)).to(tl.int32, bitcast=True)
    return (bits + 0x7FFFFF) >> 23


@triton.jit
def power_of_two(exponent):
    """float32 2^(exponent - 127) of an E8M0 byte as int32; byte 0 is zero."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["group_step"])  # the number of rows
def _quantize(x, codes, exponents, depth, x_row, row_step, group_step, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < depth
    values = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    exponent = scale_exponent(tl.max(tl.abs(values), axis=1))
    scaled = values * power_of_two(254 - exponent)[:, None]
    tl.store(codes + row * depth + column, scaled.to(tl.float8e4nv), mask=inside)
    tl.store(exponents + row * row_step + group * group_step, exponent.to(tl.uint8), mask=group * 128 < depth)


def empty_rows(num_rows: int, depth: int, device: torch.device) -> Fp8Rows:
    """Rows to be written. Exponents of a group are neighbours over the rows, as the product reads them."""
    codes = torch.empty(num_rows, depth, device=device, dtype=torch.float8_e4m3fn)
    return Fp8Rows(codes, torch.empty(depth // GROUP, num_rows, device=device, dtype=torch.uint8).t())


def quantize_rows(x: Tensor) -> Fp8Rows:
    """x bfloat16 or float32 [T, K] to E4M3 per 128 along K, bit-equal to `quantize_fp8(x, 128)`.

    One launch, to be shared by all products over x. x may be some columns of a larger matrix.
    Raises ValueError when K is no multiple of 128.
    """
    num_rows, depth = x.shape
    if depth % GROUP or x.stride(1) != 1:
        raise ValueError(
            f"quantize_rows: x is {list(x.shape)} with strides {x.stride()}; expected K a multiple of {GROUP}, stride 1"
        )
    rows = empty_rows(num_rows, depth, x.device)
    if num_rows:
        _quantize[(num_rows, triton.cdiv(depth, GROUP * BLOCK_GROUPS))](
            x,
            rows.codes,
            rows.exponents,
            depth,
            x.stride(0),
            *rows.exponents.stride(),
            GROUPS=BLOCK_GROUPS,
            num_warps=4,
        )
    return rows
