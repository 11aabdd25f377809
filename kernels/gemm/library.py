"""Products with weights as the engine calls them: the library's (cuBLAS) where it is faster, else ours in `triton`.

Measured on an H100 (benchmarks/results/kernels.jsonl): up to 32 tokens our split products are ahead; from 64 on
the library is, two to three times in a prefill. Its FP8 product takes the same E4M3 values and power-of-two scales, as
float32, and Hopper only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.gemm import quantize
from dsv4_kernels.gemm import triton as ours
from dsv4_kernels.gemm.fp8 import Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.pair import linear_pair as our_pair
from dsv4_kernels.quant.device import power_of_two


def is_for_library(x: Tensor) -> bool:
    """Whether the library multiplies x [T, K] with a weight. It promises no order of sums, so never if that counts."""
    return quantize.is_for_library(len(x), x.device)


@triton.jit(do_not_specialize=["num"])
def _widen(exponents, scales, num, BLOCK: tl.constexpr):
    """E8M0 bytes as the bits of float32."""
    wait_for_previous()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    tl.store(scales + at, tl.load(exponents + at, mask=inside, other=0).to(tl.int32) << 23, mask=inside)


def float_scales(rows: Fp8Rows) -> Tensor:
    """Scales of `empty_rows`' layout as float32 [T, K / 128], neighbours over the rows; made here if they are not."""
    if rows.scales is not None:
        return rows.scales
    by_column = rows.exponents.t()
    if not by_column.is_contiguous():
        raise ValueError(f"float_scales: exponents have strides {rows.exponents.stride()}; expected column by column")
    scales = torch.empty(by_column.shape, device=by_column.device, dtype=torch.float32)
    num, block = by_column.numel(), 1024
    _widen[(triton.cdiv(num, block),)](
        by_column, scales.view(torch.int32), num, BLOCK=block, num_warps=4, launch_pdl=launches_early(scales.device)
    )
    return scales.t()


@triton.jit
def _multiply_out(codes, exponents, values, depth, BLOCK: tl.constexpr):
    """E4M3 with a scale per 128 x 128 as bfloat16: a block of one row."""
    wait_for_previous()
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    inside = column < depth
    scale = power_of_two(tl.load(exponents + row // 128 * (depth // 128) + column // 128, mask=inside, other=0))
    found = tl.load(codes + row * depth + column, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(values + row * depth + column, found.to(tl.bfloat16), mask=inside)


def bf16_values(weight: Fp8Weight) -> Tensor:
    """The weight's values, bfloat16 [N, K], exactly: 4 bits times a power of two."""
    num_rows, depth = weight.codes.shape
    values = torch.empty(num_rows, depth, device=weight.codes.device, dtype=torch.bfloat16)
    grid = num_rows, triton.cdiv(depth, 1024)
    _multiply_out[grid](
        weight.codes, weight.exponents, values, depth, BLOCK=1024, num_warps=4, launch_pdl=launches_early(values.device)
    )
    return values


def linear_fp8(x: Fp8Rows, weight: Fp8Weight) -> Tensor:
    """x [T, K] times weight [N, K] transposed -> bfloat16 [T, N]; sums are float32 over blocks of 128 of K."""
    if not is_for_library(x.codes):
        return ours.linear_fp8(x, weight)
    recipes = torch.nn.functional.ScalingType
    return torch.nn.functional.scaled_mm(
        x.codes,
        weight.codes.t(),
        float_scales(x),
        recipes.BlockWise1x128,
        weight.float_scales,
        recipes.BlockWise128x128,
    )


def linear_bf16(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x bfloat16 [T, K] times weight bfloat16 [N, K] transposed -> float32 [T, N]: products exact, sums float32.

    `out`, contiguous, is written if there is one.
    """
    if not is_for_library(x):
        return ours.linear_bf16(x, weight, out=out)
    return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)


def linear_pair(
    x_fp8: Fp8Rows, weight: Fp8Weight, x: Tensor, matrix: Tensor | None, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Fp8Rows | None]:
    """`linear_fp8(x_fp8, weight)` and `linear_bf16(x, matrix)`, in one launch where both are ours and tokens few; for
    very few also the norm of the former, see there."""
    if not is_for_library(x):
        return our_pair(x_fp8, weight, x, matrix, norm, eps)
    return linear_fp8(x_fp8, weight), None if matrix is None else linear_bf16(x, matrix), None
