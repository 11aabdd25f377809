"""Grouped output projection in Triton: two products; between them E4M3 rows, quantised where the first one ends.

wo_a is E4M3 in the checkpoint while its input is not quantised: its values become bfloat16 exactly, inside the product.
Scales are powers of two by construction, from the checkpoint to the last product: weights and rows carry them as E8M0
exponents (`Fp8Weight` and `Fp8Rows` refuse anything else), so there is no mantissa that repacking could spill.
"""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.gemm.triton import Tiles, grouped_fp8_out, linear_fp8


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
    low = grouped_fp8_out(o.view(o.shape[0], width), wo_a, width // depth, tiles=tiles)
    return linear_fp8(low, wo_b, tiles=tiles)
