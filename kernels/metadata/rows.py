"""Where the rows of a ragged step belong: the arrays that all GPU kernels of a step share.

Addresses are arithmetic on them. With p = positions[r] and a page table int32 [slots, pages] by slot:

- ring row of position q: slots[r] * ring_rows + q % ring_rows, for q before the request's first row of the step;
- step row of position q: r - (p - q), for q from the first row of the step on;
- page row of entry e: page_table[slots[r], e // per_page] * per_page + e % per_page, per_page = page_tokens / ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """One entry per row of the step, int32 [T], on the step's device; rows of a request are neighbours.

    A row whose position is -1 pads a CUDA graph's bucket: nothing is read or written for it.
    """

    slots: Tensor
    positions: Tensor  # in the row's sequence
    firsts: Tensor  # row number of the first row of the row's request in this step
    counts: Tensor  # rows of the row's request in this step

    @classmethod
    def build(cls, slots: Tensor, starts: Tensor, counts: Tensor, num_rows: int) -> Rows:
        """From per-request arrays int32 [requests]: slot, position of the first row, number of rows (0 allowed).

        `num_rows` >= counts.sum() is the size of the bucket. No value is read back to the host, so this can be captured
        in a CUDA graph.
        """
        row = torch.arange(num_rows, device=slots.device, dtype=torch.int32)
        ends = counts.cumsum(0, dtype=torch.int32)
        request = torch.searchsorted(ends, row, right=True, out_int32=True)
        inside = request < len(counts)
        request = request.clamp_max(len(counts) - 1)
        firsts = ends[request] - counts[request]
        padding = torch.full_like(row, -1)
        return cls(
            slots=torch.where(inside, slots[request], padding),
            positions=torch.where(inside, starts[request] + row - firsts, padding),
            firsts=torch.where(inside, firsts, padding),
            counts=torch.where(inside, counts[request], torch.zeros_like(row)),
        )
