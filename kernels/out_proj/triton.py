"""Grouped output projection in Triton: two products; between them E4M3 rows, quantised where the first one ends.

wo_a is E4M3 in the checkpoint while its input is not quantised: its values become bfloat16 exactly, inside the product.
Scales are powers of two by construction, from the checkpoint to the last product: weights and rows carry them as E8M0
exponents (`Fp8Weight` and `Fp8Rows` refuse anything else), so there is no mantissa that repacking could spill.

A prefill pays for wo_a in bfloat16, made anew each time, because the library multiplies that faster than we do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.gemm import library
from dsv4_kernels.gemm.fp8 import Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.gemm.triton import Tiles, grouped_fp8_out, linear_fp8

LIBRARY_TOKENS = 1024  # from here on the library's products of bfloat16 are worth making wo_a bfloat16


def grouped_out_proj(o: Tensor, wo_a: Fp8Weight, wo_b: Fp8Weight, *, tiles: Tiles | None = None) -> Tensor:
    """Attention output bfloat16 [T, H, hd] -> bfloat16 [T, D]: `grouped_out_proj` of the reference with `quantize`.

    Args:
        o: contiguous.
        wo_a: [G * dg, (H / G) * hd], the groups one below the other as in the checkpoint; dg is a multiple of 64.
        wo_b: [D, G * dg].
        tiles: of both products, so that a row has the same bits in any batch.

    Raises ValueError for shapes that do not fit.
    """
    width = o.shape[1] * o.shape[2]
    depth = wo_a.codes.shape[1]
    if width % depth:
        raise ValueError(f"grouped_out_proj: o is {list(o.shape)}, wo_a [G * dg, K] has K = {depth}; H * hd is G * K")
    o = o.view(o.shape[0], width)
    if tiles is None and len(o) >= LIBRARY_TOKENS and library.is_for_library(o):
        low = _library_fp8_out(o, wo_a, width // depth)
    else:
        low = grouped_fp8_out(o, wo_a, width // depth, tiles=tiles)
    return library.linear_fp8(low, wo_b) if tiles is None else linear_fp8(low, wo_b, tiles=tiles)


def _library_fp8_out(o: Tensor, weight: Fp8Weight, num_groups: int) -> Fp8Rows:
    """`grouped_fp8_out` by one product of the library for each group."""
    num_rows = weight.codes.shape[0]
    low = torch.empty(len(o), num_rows, device=o.device, dtype=torch.bfloat16)
    parts = (values.chunk(num_groups, dim) for values, dim in ((o, 1), (library.bf16_values(weight), 0), (low, 1)))
    for x, rows, out in zip(*parts, strict=True):
        torch.mm(x, rows.t(), out=out)
    return quantize_rows(low)
