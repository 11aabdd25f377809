"""The product that makes a layer's queries, and all that can run beside and behind it, in one launch for few rows.

Beside it: the window row and the compressors, which need other columns of the same latents and nothing that the product
makes; one program for each row and role. Behind it: a head is four tiles of weight rows (of Pro), whose last program
norms and turns it; an index head is one tile, whose program turns, transforms and rounds it (ADR 7, rules 1 and 3).

Many rows take a launch for each: what one program does for a head of all rows is done row after row, and from some
rows on that is more than a launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.arrival import counters, is_last
from dsv4_kernels.compressor.beside import Arguments, arguments_of, merged
from dsv4_kernels.compressor.device import advance_c128, close_c4
from dsv4_kernels.compressor.triton import C4Compressor, C128Compressor
from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.gemm import triton as gemm
from dsv4_kernels.gemm.device import multiply_tile
from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.pair import FEW
from dsv4_kernels.indexer.device import prepare_index_vectors
from dsv4_kernels.kv_store import Planes
from dsv4_kernels.kv_store.device import prepare_heads, store_row
from dsv4_kernels.kv_store.triton import store_arguments
from dsv4_kernels.metadata.rows import Rows

TOKENS = tl.constexpr(16)  # of a tile: the least
MOST_ROWS = tl.constexpr(FEW)
C128_ROWS = 4  # that a C128 compressor reads at once: of 16 the four warps of a product have no room


@triton.jit
def _query_tile(
    tile,  # of 128 weight rows
    codes,  # e4m3 [tokens, depth], rows code_row apart
    exponents,  # uint8 [tokens, depth / 128], strides token_step and block_step
    weight,  # e4m3 [num_columns, depth]
    weight_exponents,
    queries,  # bf16 [tokens, num_columns]
    arrived,  # int32, zero: of each head
    index_weights,  # [tokens, INDEX_HEADS], rows index_weights_row apart
    new_index_q,  # bf16 [tokens, INDEX_HEADS, INDEX_DIM]
    new_index_weights,  # bf16 [tokens, INDEX_HEADS]
    positions,
    turns,  # f32 [tokens, ROPE]
    num_tokens,
    num_columns,
    depth,
    code_row,
    token_step,
    block_step,
    index_weights_row,
    eps,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    INDEX_HEADS: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Multiply a tile of queries, and prepare what is whole with it."""
    multiply_tile(
        tile, 0, codes, exponents, weight, weight_exponents, arrived, queries, queries, queries, queries, num_tokens,
        num_columns, num_columns + 128, depth, code_row, token_step, block_step, 0, 0, "fp8", False, False, 1, 1, 128,
        TOKENS, 128, 16,
    )  # fmt: skip
    if tile * 128 < HEADS * DIM:
        head = tile * 128 // DIM
        if is_last(arrived + head, DIM // 128):
            row = tl.arange(0, MOST_ROWS)[:, None].to(tl.int64)
            keep = tl.load(positions + row, mask=row < num_tokens, other=-1) >= 0
            at = queries + row * num_columns + head * DIM
            prepare_heads(at, turns + tl.minimum(row, num_tokens - 1) * ROPE, at, keep, eps, DIM, ROPE)
    elif INDEX_HEADS > 0:
        tl.debug_barrier()  # the tile's results are those of other threads
        of_tile: tl.constexpr = 128 // INDEX_DIM
        number = tl.arange(0, TOKENS * of_tile)
        index_head = (tile - HEADS * DIM // 128) * of_tile + number % of_tile
        vector = tl.where(index_head < INDEX_HEADS, number // of_tile, num_tokens) * INDEX_HEADS + index_head
        prepare_index_vectors(
            queries + HEADS * DIM, index_weights, positions, turns, new_index_q, new_index_weights,
            vector.to(tl.int64), num_tokens * INDEX_HEADS, num_columns, index_weights_row, scale, INDEX_HEADS,
            INDEX_DIM, ROPE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "block_step"])
def _queries_c4(
    # as of `_query_tile`
    codes, exponents, weight, weight_exponents, queries, arrived, index_weights, new_index_q, new_index_weights,
    positions, turns, num_tokens, num_columns, depth, code_row, token_step, block_step, index_weights_row, eps, scale,
    # as of `_c4`: both compressors
    c_raw, c_ape, c_ring, c_norm, c_data, c_rope_data, c_scales, c_raw_stride, c_raw_2, c_ape_2, c_ring_2, c_norm_2,
    c_data_2, c_rope_data_2, c_scales_2, c_raw_stride_2, c_slots, c_positions, c_firsts, c_counts, c_page_table,
    c_rotations, c_table_width, c_eps,
    # as of `_store`: window rows
    kv_kv, kv_weight, kv_rotations, kv_slots, kv_positions, kv_counts, kv_step_codes, kv_step_rope, kv_step_scale,
    kv_ring_codes, kv_ring_rope, kv_ring_scale, kv_kv_row, kv_ring_rows, kv_room, kv_eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, INDEX_HEADS: tl.constexpr, INDEX_DIM: tl.constexpr, ROPE: tl.constexpr,
    C_D: tl.constexpr, C_FORMAT: tl.constexpr, C_BLOCK: tl.constexpr, C_D_2: tl.constexpr, C_FORMAT_2: tl.constexpr,
    C_BLOCK_2: tl.constexpr, C_ROPE: tl.constexpr, C_RING: tl.constexpr, C_PER_PAGE: tl.constexpr,
    KV_DIM: tl.constexpr, KV_GROUP: tl.constexpr, KV_GROUPS: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    program = tl.program_id(0)
    if program >= 3 * num_tokens:
        tiles = tl.cdiv(num_columns, 128)
        # Index queries first, because their programs have most to do.
        tile = (program - 3 * num_tokens + HEADS * DIM // 128) % tiles
        _query_tile(
            tile, codes, exponents, weight, weight_exponents, queries, arrived, index_weights, new_index_q,
            new_index_weights, positions, turns, num_tokens, num_columns, depth, code_row, token_step, block_step,
            index_weights_row, eps, scale, HEADS, DIM, INDEX_HEADS, INDEX_DIM, ROPE,
        )  # fmt: skip
    elif program % 3 == 0:
        close_c4(
            (program // 3).to(tl.int64), c_raw, c_ape, c_ring, c_norm, c_data, c_rope_data, c_scales, c_raw_stride,
            c_slots, c_positions, c_firsts, c_counts, c_page_table, c_rotations, c_table_width, c_eps, C_D, C_FORMAT,
            C_BLOCK, C_ROPE, C_RING, C_PER_PAGE,
        )  # fmt: skip
    elif program % 3 == 1:
        close_c4(
            (program // 3).to(tl.int64), c_raw_2, c_ape_2, c_ring_2, c_norm_2, c_data_2, c_rope_data_2, c_scales_2,
            c_raw_stride_2, c_slots, c_positions, c_firsts, c_counts, c_page_table, c_rotations, c_table_width, c_eps,
            C_D_2, C_FORMAT_2, C_BLOCK_2, C_ROPE, C_RING, C_PER_PAGE,
        )  # fmt: skip
    else:
        store_row(
            (program // 3).to(tl.int64), kv_kv, kv_weight, kv_rotations, kv_slots, kv_positions, kv_counts,
            kv_step_codes, kv_step_rope, kv_step_scale, kv_ring_codes, kv_ring_rope, kv_ring_scale, kv_kv_row,
            kv_ring_rows, kv_room, kv_eps, KV_DIM, KV_GROUP, KV_GROUPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "block_step"])
def _queries_c128(
    # as of `_query_tile`
    codes, exponents, weight, weight_exponents, queries, arrived, index_weights, new_index_q, new_index_weights,
    positions, turns, num_tokens, num_columns, depth, code_row, token_step, block_step, index_weights_row, eps, scale,
    # as of `_c128`
    c_raw, c_ape, c_state, c_norm, c_data, c_rope_data, c_scales, c_slots, c_positions, c_firsts, c_counts,
    c_page_table, c_rotations, c_raw_stride, c_table_width, c_eps,
    # as of `_store`: window rows
    kv_kv, kv_weight, kv_rotations, kv_slots, kv_positions, kv_counts, kv_step_codes, kv_step_rope, kv_step_scale,
    kv_ring_codes, kv_ring_rope, kv_ring_scale, kv_kv_row, kv_ring_rows, kv_room, kv_eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, INDEX_HEADS: tl.constexpr, INDEX_DIM: tl.constexpr, ROPE: tl.constexpr,
    C_D: tl.constexpr, C_ROPE: tl.constexpr, C_PER_PAGE: tl.constexpr, C_FORMAT: tl.constexpr, C_BANKS: tl.constexpr,
    C_BLOCK: tl.constexpr, C_BLOCK_R: tl.constexpr, KV_DIM: tl.constexpr, KV_GROUP: tl.constexpr,
    KV_GROUPS: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    program = tl.program_id(0)
    if program >= 2 * num_tokens:
        _query_tile(
            program - 2 * num_tokens, codes, exponents, weight, weight_exponents, queries, arrived, index_weights,
            new_index_q, new_index_weights, positions, turns, num_tokens, num_columns, depth, code_row, token_step,
            block_step, index_weights_row, eps, scale, HEADS, DIM, INDEX_HEADS, INDEX_DIM, ROPE,
        )  # fmt: skip
    elif program % 2 == 0:
        advance_c128(
            (program // 2).to(tl.int64), c_raw, c_ape, c_state, c_norm, c_data, c_rope_data, c_scales, c_slots,
            c_positions, c_firsts, c_counts, c_page_table, c_rotations, c_raw_stride, c_table_width, c_eps, C_D, C_ROPE,
            C_PER_PAGE, C_FORMAT, C_BANKS, C_BLOCK, C_BLOCK_R,
        )  # fmt: skip
    else:
        store_row(
            (program // 2).to(tl.int64), kv_kv, kv_weight, kv_rotations, kv_slots, kv_positions, kv_counts,
            kv_step_codes, kv_step_rope, kv_step_scale, kv_ring_codes, kv_ring_rope, kv_ring_scale, kv_kv_row,
            kv_ring_rows, kv_room, kv_eps, KV_DIM, KV_GROUP, KV_GROUPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "block_step"])
def _queries(
    # as of `_query_tile`
    codes, exponents, weight, weight_exponents, queries, arrived, index_weights, new_index_q, new_index_weights,
    positions, turns, num_tokens, num_columns, depth, code_row, token_step, block_step, index_weights_row, eps, scale,
    # as of `_store`: window rows
    kv_kv, kv_weight, kv_rotations, kv_slots, kv_positions, kv_counts, kv_step_codes, kv_step_rope, kv_step_scale,
    kv_ring_codes, kv_ring_rope, kv_ring_scale, kv_kv_row, kv_ring_rows, kv_room, kv_eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, INDEX_HEADS: tl.constexpr, INDEX_DIM: tl.constexpr, ROPE: tl.constexpr,
    KV_DIM: tl.constexpr, KV_GROUP: tl.constexpr, KV_GROUPS: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    program = tl.program_id(0)
    if program >= num_tokens:
        _query_tile(
            program - num_tokens, codes, exponents, weight, weight_exponents, queries, arrived, index_weights,
            new_index_q, new_index_weights, positions, turns, num_tokens, num_columns, depth, code_row, token_step,
            block_step, index_weights_row, eps, scale, HEADS, DIM, INDEX_HEADS, INDEX_DIM, ROPE,
        )  # fmt: skip
    else:
        store_row(
            program.to(tl.int64), kv_kv, kv_weight, kv_rotations, kv_slots, kv_positions, kv_counts,
            kv_step_codes, kv_step_rope, kv_step_scale, kv_ring_codes, kv_ring_rope, kv_ring_scale, kv_kv_row,
            kv_ring_rows, kv_room, kv_eps, KV_DIM, KV_GROUP, KV_GROUPS,
        )  # fmt: skip


def make_queries(
    normed: Fp8Rows,
    weight: Fp8Weight,
    num_heads: int,
    kv: Tensor,
    kv_norm: Tensor,
    eps: float,
    turns: Tensor,
    rows: Rows,
    step_planes: Planes,
    ring_planes: Planes,
    ring_rows: int,
    window: int,
    compressors: Sequence[C4Compressor] | C128Compressor | None,
    rotations: Tensor,
    page_table: Tensor,
    page_tokens: int,
    index_weights: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """`prepare_queries` (or `prepare_q`) of `linear_fp8(normed, weight)`; and `store_kv`, and the layer's compressors.

    Args:
        normed: query latents [T, K] after their norm, T at most FEW.
        weight: [num_heads * D + index_heads * I, K], D being the columns of `kv`.
        kv .. window, compressors .. page_tokens: of `prepare_rows`; None of a layer without compressors.
        index_weights, scale: weights of `prepare_queries` and its scale; None for a layer that does not choose.

    Returns:
        Heads, bf16 [T, num_heads, D]; of a layer that chooses also index queries, bf16 [T, index_heads, I], and their
        weights, bf16 [T, index_heads].

    Raises ValueError for other shapes.
    """
    num_tokens, (num_columns, depth), dim = len(normed.codes), weight.codes.shape, kv.shape[1]
    heads_from, index_heads = num_heads * dim, 0 if index_weights is None else index_weights.shape[1]
    index_dim, left = divmod(num_columns - heads_from, index_heads or 1)
    fits = not left and not dim % GROUP and (index_dim in (32, 64, 128) if index_heads else not index_dim)
    if not fits or not 0 < num_tokens <= FEW:
        raise ValueError(
            f"make_queries: {num_tokens} rows, a weight of {num_columns} rows for {num_heads} heads of {dim} dims and "
            f"{index_heads} index heads; expected 1 to {FEW} rows, multiples of {GROUP} dims, and 32, 64 or 128 "
            "of index heads"
        )
    gemm.check_fp8(normed, weight)
    device = kv.device
    queries = torch.empty(num_tokens, num_columns, device=device, dtype=torch.bfloat16)
    given, index_q, new_weights = (queries,) * 3
    if index_weights is not None:
        given = index_weights
        index_q = torch.empty(num_tokens, index_heads, index_dim, device=device, dtype=queries.dtype)
        new_weights = torch.empty(num_tokens, index_heads, device=device, dtype=queries.dtype)
    of_product: list[Tensor | int | float] = [
        normed.codes, normed.exponents, weight.codes, weight.exponents, queries, counters(device, num_heads), given,
        index_q, new_weights, rows.positions, torch.view_as_real(turns), num_tokens, num_columns, depth,
        normed.codes.stride(0), *normed.exponents.stride(), given.stride(0), eps, scale,
    ]  # fmt: skip
    of_entries: Arguments = [], {}
    kernel, roles = _queries, 1
    if compressors is not None:
        of_entries = arguments_of(compressors, eps, rotations, rows, page_table, page_tokens)
        kernel, roles = (_queries_c128, 2) if isinstance(compressors, C128Compressor) else (_queries_c4, 3)
    arguments, sizes = merged(
        ("", (of_product, {})),
        ("C_", of_entries),
        ("KV_", store_arguments(kv, kv_norm, eps, turns, rows, step_planes, ring_planes, ring_rows, window)),
    )
    constants = {name: value for name, value in sizes.items() if name.isupper()}
    if "C_BLOCK_R" in constants:
        constants["C_BLOCK_R"] = C128_ROWS
    kernel[(roles * num_tokens + triton.cdiv(num_columns, gemm.TILE_ROWS),)](
        *arguments,
        **constants,
        HEADS=num_heads,
        DIM=dim,
        INDEX_HEADS=index_heads,
        INDEX_DIM=index_dim or GROUP,
        ROPE=2 * turns.shape[1],
        num_warps=4,
        num_stages=4,
        launch_pdl=launches_early(device),
    )
    heads = queries[:, :heads_from].unflatten(1, (num_heads, dim))
    return (heads, index_q, new_weights) if index_heads else (heads,)
