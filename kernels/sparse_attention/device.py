"""What the kernels of sparse attention share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_blocks(position, num_chosen, split, num_splits, RATIO, CHOSEN, WINDOW_BLOCKS, KEYS):
    """Key blocks [first, last) of one split of a row; none for padding."""
    entries = num_chosen if CHOSEN else ((position + 1) // RATIO if RATIO > 0 else 0)
    blocks = tl.where(position >= 0, WINDOW_BLOCKS + tl.cdiv(entries, KEYS), 0)
    each = tl.cdiv(blocks, num_splits)
    return split * each, tl.minimum((split + 1) * each, blocks)
