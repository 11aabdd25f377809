"""Attention over the sliding window and selected compressed entries, with a per-head sink and inverse RoPE.

K and V are the same vectors (docs/model.md section 4). Keys come through tables of row numbers built by `metadata`
and `indexer`; masked cells are -1.
"""

from dsv4_kernels.cpu import preferred
from dsv4_kernels.sparse_attention import cpu, reference
from dsv4_kernels.sparse_attention.reference import Keys, attend

__all__ = ["Keys", "attend", "sparse_attention"]

sparse_attention = preferred(cpu.sparse_attention, reference.sparse_attention)
