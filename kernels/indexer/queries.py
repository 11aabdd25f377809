"""The queries of a C4 layer in Triton, behind the product that makes them: heads that attend and heads that choose.

Up to eight rows their product does all of this (kernels/gemm/queries.py). Up to 127 take one launch. Its first programs
prepare index queries, which take a product with the Hadamard matrix and so the longest; the others prepare the heads of
attention (docs/adr/0007-the-last-program-finishes.md, rule 3). Many rows take two, because the heads then have the
registers of the product and too few programs to keep the memory busy: on an H100 one launch took 384 us for 2,048 rows
of Pro, of which the heads alone take 194.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.deterministic import is_deterministic
from dsv4_kernels.indexer.device import prepare_index_vectors
from dsv4_kernels.kv_store.device import prepare_row_heads
from dsv4_kernels.kv_store.triton import PROGRAM_HEADS, check_dims, prepare_q
from dsv4_kernels.metadata.rows import Rows

BLOCK = 64  # index vectors of one program
MANY = 128  # rows from which on the heads have a launch of their own


@triton.jit(do_not_specialize=["num_vectors"])
def _prepare(
    queries,  # bf16 [rows, num_heads * DIM + INDEX_HEADS * INDEX_DIM], rows queries_row apart
    index_queries,  # its column num_heads * DIM
    weights,  # [rows, INDEX_HEADS], rows weights_row apart
    positions,
    rotations,  # f32 [rows, ROPE]
    index_q,  # bf16 [rows, INDEX_HEADS, INDEX_DIM]
    index_weights,  # bf16 [rows, INDEX_HEADS]
    num_heads,
    num_vectors,
    queries_row,
    weights_row,
    eps,
    scale,
    DIM: tl.constexpr,
    INDEX_HEADS: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    program = tl.program_id(0)
    num_index = tl.cdiv(num_vectors, BLOCK)
    if program < num_index:
        vector = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        prepare_index_vectors(
            index_queries, weights, positions, rotations, index_q, index_weights, vector, num_vectors,
            queries_row, weights_row, scale, INDEX_HEADS, INDEX_DIM, ROPE,
        )  # fmt: skip
    else:
        per_row = tl.cdiv(num_heads, HEADS)
        row = ((program - num_index) // per_row).to(tl.int64)
        first_head = (program - num_index) % per_row * HEADS
        prepare_row_heads(
            queries, rotations, positions, queries, row, first_head, num_heads,
            queries_row, queries_row, eps, DIM, ROPE, HEADS,
        )  # fmt: skip


def prepare_queries(
    queries: Tensor,
    num_heads: int,
    head_dim: int,
    eps: float,
    weights: Tensor,
    scale: float,
    rotations: Tensor,
    rows: Rows,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as `sparse_attention` takes them, index queries and head weights as `select` does.

    Heads get what `prepare_q` does to them (docs/model.md section 4). Index queries are rotated, multiplied by the
    Hadamard matrix and rounded to FP4; weights are multiplied by `scale` (section 6).

    Args:
        queries: bf16 [T, num_heads * head_dim + index_heads * index_dim], rows of any stride; its heads are changed in
            place. Both dims are powers of two.
        weights: f32 or bf16 [T, index_heads], contiguous columns; rounded to bfloat16 before and after the product.
        rotations: complex64 [T, 32] at the rows' positions, for both.

    Returns:
        The heads, bf16 [T, num_heads, head_dim], part of `queries`; bf16 [T, index_heads, index_dim]; bf16
        [T, index_heads]. Padding rows are not written.

    Raises ValueError for other shapes, types and strides.
    """
    num_rows, num_columns = queries.shape
    index_heads, index_from = weights.shape[1], num_heads * head_dim
    index_dim, left = divmod(num_columns - index_from, index_heads)
    if left or index_dim < 32 or index_dim & (index_dim - 1) or head_dim & (head_dim - 1):
        raise ValueError(
            f"prepare_queries: {num_columns} columns for {num_heads} heads of {head_dim} dims and {index_heads} index "
            "heads; expected powers of two as dims, index dims from 32 on"
        )
    if queries.dtype != torch.bfloat16 or queries.stride(1) != 1 or weights.stride(1) != 1:
        raise ValueError(
            f"prepare_queries: queries are {queries.dtype}, strides {queries.stride()}, weights have strides "
            f"{weights.stride()}; expected bfloat16 and contiguous columns"
        )
    check_dims(head_dim, rotations)
    index_q = torch.empty(num_rows, index_heads, index_dim, device=queries.device, dtype=queries.dtype)
    index_weights = torch.empty(num_rows, index_heads, device=queries.device, dtype=queries.dtype)
    heads = queries[:, :index_from].unflatten(1, (num_heads, head_dim))
    apart = num_rows >= MANY or is_deterministic()  # one kernel has one order of the sum over a head
    if apart:
        prepare_q(heads, eps, rotations, rows)
    if num_rows:
        num_vectors = num_rows * index_heads
        others = num_rows * triton.cdiv(num_heads, PROGRAM_HEADS) if not apart else 0
        _prepare[(triton.cdiv(num_vectors, BLOCK) + others,)](
            queries,
            queries[:, index_from:],
            weights,
            rows.positions,
            torch.view_as_real(rotations),
            index_q,
            index_weights,
            num_heads,
            num_vectors,
            queries.stride(0),
            weights.stride(0),
            eps,
            scale,
            DIM=head_dim,
            INDEX_HEADS=index_heads,
            INDEX_DIM=index_dim,
            ROPE=2 * rotations.shape[1],
            HEADS=PROGRAM_HEADS,
            BLOCK=BLOCK,
            num_warps=4,
            launch_pdl=launches_early(queries.device),
        )
    return heads, index_q, index_weights
