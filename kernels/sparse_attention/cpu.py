"""Sparse attention in C: float32 keys that the cache stores as they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dsv4_kernels import cpu
from dsv4_kernels.sparse_attention.reference import Keys

HEADS = 4  # of csrc/cpu/attention.c: heads whose scores are computed together


def sparse_attention(q: Tensor, sources: Sequence[Keys], sink: Tensor, rotations: Tensor) -> Tensor | None:
    """See reference.py. One or two sources; masked rows are not read."""
    num_tokens, num_heads, length = q.shape
    if length % cpu.LANES or len(sources) > 2 or q.stride(2) != 1 or q.stride(1) != length:
        return None
    if not rotations.is_contiguous():
        return None
    keys: list[int] = []
    num_keys = 0
    for source in sources:
        values, table = source.values, source.table
        if values is None or not (cpu.fits(q, sink, values) and values.is_contiguous() and table.is_contiguous()):
            return None
        keys += (values.data_ptr(), table.data_ptr(), table.shape[1])
        num_keys += table.shape[1]
    if len(sources) == 1:
        keys += (0, 0, 0)
    # For each key a pointer and its scores with a few heads.
    work = q.new_empty((2 + HEADS) * (num_keys + cpu.LANES))
    out = q.new_empty(q.shape)
    cpu.library.dsv4_sparse_attention(
        q.data_ptr(),
        q.stride(0),
        *keys,
        sink.data_ptr(),
        rotations.data_ptr(),
        out.data_ptr(),
        work.data_ptr(),
        num_tokens,
        num_heads,
        length,
        rotations.shape[1],
    )
    return out
