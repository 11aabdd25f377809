"""Index arithmetic of a ragged step: which ring, page and step rows each token reads and writes.

Raw inputs are per request (slot, first position, row count, page table); everything else is derived, so a CUDA graph
can hold it. The reference builds each table once a step, on first use, and all layers share it.
"""

from dsv4_kernels.metadata.plan import StepPlan
from dsv4_kernels.metadata.reference import C4, C4_WIDTH, C128, Closings, Group, HistoryTable, Segments, StepMetadata
from dsv4_kernels.metadata.rows import Rows

__all__ = [
    "C4",
    "C4_WIDTH",
    "C128",
    "Closings",
    "Group",
    "HistoryTable",
    "Rows",
    "Segments",
    "StepMetadata",
    "StepPlan",
]
