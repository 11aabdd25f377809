"""The C4 indexer: which compressed entries a query attends to (docs/model.md section 6).

Tie rule: of equal scores the lower entry id is chosen. On a GPU, `dsv4_kernels.indexer.triton` works on pages of keys.
"""

from dsv4_kernels.indexer.reference import index_scores, select, select_entries

__all__ = ["index_scores", "select", "select_entries"]
