"""What a layer does with the products over its input, row by row, in one launch: four operations side by side.

Norm and E4M3 of the query latent (kernels/norm), the window row (kernels/kv_store), and the layer's compressors need a
row of these products each and nothing of one another, so programs of different roles share a grid (ADR 7, rule 3).
Many rows take a launch for each operation, because the light ones then lose more programs to the registers of the
compressors than launches cost: of a C4 layer four programs fit on a multiprocessor, where the norm alone has eight. Few
rows have all of it in the launches of the products before and behind (kernels/gemm/queries.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.compressor.device import advance_c128, close_c4
from dsv4_kernels.compressor.triton import (
    C4Compressor,
    C128Compressor,
    c4_arguments,
    c128_arguments,
    compress_c4,
    compress_c128,
)
from dsv4_kernels.dependent import wait_for_previous
from dsv4_kernels.deterministic import is_deterministic
from dsv4_kernels.gemm.fp8 import Fp8Rows
from dsv4_kernels.gemm.quantize import empty_rows
from dsv4_kernels.kv_store import Planes
from dsv4_kernels.kv_store.device import store_row
from dsv4_kernels.kv_store.triton import store_arguments, store_kv
from dsv4_kernels.metadata.rows import Rows
from dsv4_kernels.norm.device import norm_row
from dsv4_kernels.norm.triton import norm_arguments, rms_norm_fp8

Arguments = tuple[list[Tensor | int | float], Mapping[str, int | str]]  # of a kernel, and its constants

MANY = 128  # rows from which on each operation has a launch of its own


@triton.jit(do_not_specialize=["query_group_step"])  # the number of rows
def _beside_c4(
    # as of `_c4`: both compressors
    raw, ape, ring, norm, data, rope_data, scales, raw_stride, raw_2, ape_2, ring_2, norm_2, data_2, rope_data_2,
    scales_2, raw_stride_2, slots, positions, firsts, counts, page_table, rotations, table_width, eps,
    # as of `_rms_norm`: norm and E4M3 of the query latent
    query_x, query_weight, query_out, query_exponents, query_scales, query_dim, query_x_row, query_row_step,
    query_group_step, query_eps,
    # as of `_store`: window rows
    kv_kv, kv_weight, kv_rotations, kv_slots, kv_positions, kv_counts, kv_step_codes, kv_step_rope, kv_step_scale,
    kv_ring_codes, kv_ring_rope, kv_ring_scale, kv_kv_row, kv_ring_rows, kv_room, kv_eps,
    D: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr, D_2: tl.constexpr, FORMAT_2: tl.constexpr,
    BLOCK_2: tl.constexpr, ROPE: tl.constexpr, RING: tl.constexpr, PER_PAGE: tl.constexpr,
    QUERY_HAS_WEIGHT: tl.constexpr, QUERY_QUANTIZE: tl.constexpr, QUERY_GROUPS: tl.constexpr, KV_DIM: tl.constexpr,
    KV_GROUP: tl.constexpr, KV_GROUPS: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    row, role = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if role == 0:
        close_c4(
            row, raw, ape, ring, norm, data, rope_data, scales, raw_stride, slots, positions, firsts, counts,
            page_table, rotations, table_width, eps, D, FORMAT, BLOCK, ROPE, RING, PER_PAGE,
        )  # fmt: skip
    elif role == 1:
        close_c4(
            row, raw_2, ape_2, ring_2, norm_2, data_2, rope_data_2, scales_2, raw_stride_2, slots, positions, firsts,
            counts, page_table, rotations, table_width, eps, D_2, FORMAT_2, BLOCK_2, ROPE, RING, PER_PAGE,
        )  # fmt: skip
    elif role == 2:
        norm_row(
            row, query_x, query_weight, query_out, query_exponents, query_scales, query_dim, query_x_row,
            query_row_step, query_group_step, query_eps, QUERY_HAS_WEIGHT, QUERY_QUANTIZE, QUERY_GROUPS,
        )  # fmt: skip
    else:
        store_row(
            row, kv_kv, kv_weight, kv_rotations, kv_slots, kv_positions, kv_counts, kv_step_codes, kv_step_rope,
            kv_step_scale, kv_ring_codes, kv_ring_rope, kv_ring_scale, kv_kv_row, kv_ring_rows, kv_room, kv_eps,
            KV_DIM, KV_GROUP, KV_GROUPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["query_group_step"])  # the number of rows
def _beside_c128(
    # as of `_c128`
    raw, ape, state, norm, data, rope_data, scales, slots, positions, firsts, counts, page_table, rotations,
    raw_stride, table_width, eps,
    # as of `_rms_norm`: norm and E4M3 of the query latent
    query_x, query_weight, query_out, query_exponents, query_scales, query_dim, query_x_row, query_row_step,
    query_group_step, query_eps,
    # as of `_store`: window rows
    kv_kv, kv_weight, kv_rotations, kv_slots, kv_positions, kv_counts, kv_step_codes, kv_step_rope, kv_step_scale,
    kv_ring_codes, kv_ring_rope, kv_ring_scale, kv_kv_row, kv_ring_rows, kv_room, kv_eps,
    D: tl.constexpr, ROPE: tl.constexpr, PER_PAGE: tl.constexpr, FORMAT: tl.constexpr, BANKS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, QUERY_HAS_WEIGHT: tl.constexpr, QUERY_QUANTIZE: tl.constexpr,
    QUERY_GROUPS: tl.constexpr, KV_DIM: tl.constexpr, KV_GROUP: tl.constexpr, KV_GROUPS: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    row, role = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if role == 0:
        advance_c128(
            row, raw, ape, state, norm, data, rope_data, scales, slots, positions, firsts, counts, page_table,
            rotations, raw_stride, table_width, eps, D, ROPE, PER_PAGE, FORMAT, BANKS, BLOCK, BLOCK_R,
        )  # fmt: skip
    elif role == 1:
        norm_row(
            row, query_x, query_weight, query_out, query_exponents, query_scales, query_dim, query_x_row,
            query_row_step, query_group_step, query_eps, QUERY_HAS_WEIGHT, QUERY_QUANTIZE, QUERY_GROUPS,
        )  # fmt: skip
    else:
        store_row(
            row, kv_kv, kv_weight, kv_rotations, kv_slots, kv_positions, kv_counts, kv_step_codes, kv_step_rope,
            kv_step_scale, kv_ring_codes, kv_ring_rope, kv_ring_scale, kv_kv_row, kv_ring_rows, kv_room, kv_eps,
            KV_DIM, KV_GROUP, KV_GROUPS,
        )  # fmt: skip


def prepare_rows(
    query: Tensor,
    query_norm: Tensor,
    kv: Tensor,
    kv_norm: Tensor,
    eps: float,
    turns: Tensor,
    rows: Rows,
    step_planes: Planes,
    ring_planes: Planes,
    ring_rows: int,
    window: int,
    compressors: Sequence[C4Compressor] | C128Compressor,
    rotations: Tensor,
    page_table: Tensor,
    page_tokens: int,
) -> Fp8Rows:
    """`rms_norm_fp8` of the query latent, which is returned, `store_kv`, and `compress_c4` or `compress_c128`.

    Args:
        query, query_norm: bf16 [T, D], D a multiple of 128, and f32 [D].
        kv, kv_norm, step_planes, ring_planes, ring_rows, window: of `store_kv`; turns: its rotations.
        compressors: both of a C4 layer, or the one of a C128 layer.
        rotations, page_table, page_tokens: of the compressors.

    Raises ValueError for what the operations do not take.
    """
    of_store = kv, kv_norm, eps, turns, rows, step_planes, ring_planes, ring_rows, window
    of_entries = eps, rotations, rows, page_table, page_tokens
    if not 0 < len(query) < MANY or is_deterministic():  # a kernel has its own order of a norm's sum
        store_kv(*of_store)
        compress(compressors, *of_entries)
        return rms_norm_fp8(query, query_norm, eps)
    normed = empty_rows(*query.shape, query.device, scales=True)
    arguments, sizes = merged(
        ("", arguments_of(compressors, *of_entries)),
        ("QUERY_", norm_arguments(query, query_norm, eps, normed)),
        ("KV_", store_arguments(*of_store)),
    )
    if isinstance(compressors, C128Compressor):
        _beside_c128[(len(query), 3)](*arguments, **sizes)
    else:
        _beside_c4[(len(query), 4)](*arguments, **sizes)
    return normed


def compress(
    compressors: Sequence[C4Compressor] | C128Compressor,
    eps: float,
    rotations: Tensor,
    rows: Rows,
    page_table: Tensor,
    page_tokens: int,
) -> None:
    """`compress_c4` or `compress_c128`."""
    if isinstance(compressors, C128Compressor):
        raw, ape, norm = compressors.raw, compressors.ape, compressors.norm
        kept = compressors.state, compressors.planes, compressors.row_format
        compress_c128(raw, ape, norm, eps, rotations, rows, page_table, page_tokens, *kept)
    else:
        compress_c4(compressors, eps, rotations, rows, page_table, page_tokens)


def arguments_of(compressors: Sequence[C4Compressor] | C128Compressor, *of_entries: Any) -> Arguments:
    """Of `_c4` or `_c128`."""
    if isinstance(compressors, C128Compressor):
        return c128_arguments(compressors, *of_entries)
    return c4_arguments(compressors, *of_entries)


def merged(*parts: tuple[str, Arguments]) -> Arguments:
    """Arguments of several kernels one after the other; what is before a part is before the names of its constants."""
    arguments: list[Tensor | int | float] = []
    sizes: dict[str, int | str] = {}
    for prefix, (given, constants) in parts:
        arguments += given
        sizes |= {prefix + name: value for name, value in constants.items()}
    return arguments, sizes
