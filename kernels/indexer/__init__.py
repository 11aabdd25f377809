"""The C4 indexer: which compressed entries a query attends to (docs/model.md section 6).

Tie rule: of equal scores the lower entry id is chosen.
"""

from dsv4_kernels.indexer.reference import index_scores, select, select_entries

__all__ = ["index_scores", "select", "select_entries"]
