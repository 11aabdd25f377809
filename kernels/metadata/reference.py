"""All index arithmetic of a step, from a few raw per-request arrays.

Row numbers are flat: ring row = slot * ring_rows + position % ring_rows, page row = page * rows_per_page + offset.
-1 means masked; cache planes keep their last row zero, so -1 may be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.int64]

C4, C128 = 4, 128
C4_WIDTH = 8  # rows that one C4 entry pools: the previous block's early half and its own


@dataclass(frozen=True)
class Group:
    """Neighbouring requests of a step with the same number of rows; they batch as [num_requests, num_rows]."""

    first_request: int
    num_requests: int
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class HistoryTable:
    """Where the rows of positions p - width + 1 .. p of some tokens are; -1 = before the sequence.

    A chunk longer than the ring's room would overwrite rows that its own first tokens still need. So there are two
    cases. `local` False: every request fits the room, the step's rows are committed to the ring first and `table`
    holds flat ring rows. `local` True: `table` indexes the ring rows of the step's requests (request * ring_rows +
    position % ring_rows) followed by the step's new rows; the commit comes after the read.
    """

    table: Tensor  # int64 [n, width]
    local: bool


@dataclass(frozen=True)
class Segments:
    """Runs of a step's rows inside one C128 block of one request.

    Where the last rows of a request are drafts, each of its rows ends a run of its own: the run of its j-th row in the
    step leaves in bank j of the slot's states what holds if the request goes on behind that row.
    """

    rows: Tensor  # int64 [segments, longest]: step rows, -1 beyond the segment's end
    sources: Tensor  # int64 [segments]: state row, slot * banks, that the segment continues
    targets: Tensor  # int64 [segments]: state row, slot * banks + bank, where it ends
    fresh: Tensor  # bool [segments]: starts its block, so the slot's running state is not read
    closing: Tensor  # int64 [closed]: segments that complete their block
    open: Tensor  # int64 [segments - closed]: segments whose state goes back to the slot
    entry_rows: Tensor  # int64 [closed]: page rows of the completed entries
    entry_ids: Tensor  # int64 [closed]


@dataclass(frozen=True)
class Closings:
    """C4 entries that this step completes."""

    history: HistoryTable  # width 8
    entry_rows: Tensor  # int64 [closed]: page rows
    entry_ids: Tensor  # int64 [closed]


class StepMetadata:
    """Raw arrays of a ragged step and the tables derived from them (each built when first used, then shared by layers).

    Args:
        slots: slot of each request.
        starts: position of each request's first row (its num_computed_tokens).
        counts: rows of each request, at least 1; rows of a request are neighbours.
        page_table: int64 [requests, pages], -1 where there is no page.
        page_tokens: token positions per page, a multiple of 128.
        c4_ring_rows: rows of the C4 state ring: 8, more when drafts need room.
        drafts: how many of each request's rows, its last ones, are drafts that may be rejected; empty = none.
        c128_banks: running C128 states per slot: 1, and one for each draft that a request may have.

    The arithmetic is numpy's because a call costs a third of torch's on arrays this small.
    """

    def __init__(
        self,
        slots: list[int],
        starts: list[int],
        counts: list[int],
        page_table: Array,
        page_tokens: int,
        c4_ring_rows: int = C4_WIDTH,
        drafts: Sequence[int] = (),
        c128_banks: int = 1,
    ) -> None:
        self.counts, self.page_table, self.page_tokens = counts, page_table, page_tokens
        self._drafts, self._c128_banks = drafts, c128_banks
        self.num_rows, self.longest = sum(counts), max(counts, default=0)
        self._c4_ring_rows = c4_ring_rows
        self._slots = np.array(slots, dtype=np.int64)
        self._starts = np.array(starts, dtype=np.int64)
        self._counts = np.array(counts, dtype=np.int64)
        self._row_starts = self._counts.cumsum() - self._counts
        self._requests = np.repeat(np.arange(len(counts)), self._counts)
        self._positions = np.arange(self.num_rows) + (self._starts - self._row_starts)[self._requests]
        self._row_slots = self._slots[self._requests]
        self._windows: dict[tuple[int, int], HistoryTable] = {}
        self._commits: dict[int, tuple[Tensor, Tensor]] = {}
        self._all_entries: dict[int, Tensor] = {}
        self._group_rows: dict[Group, Tensor] = {}

    @cached_property
    def slots(self) -> Tensor:
        """int64 [requests]."""
        return torch.from_numpy(self._slots)

    @property
    def first_rows(self) -> list[int]:
        """The step row of each request's first position."""
        return self._row_starts.tolist()

    @cached_property
    def positions(self) -> Tensor:
        """int64 [rows], position of each row in its sequence."""
        return torch.from_numpy(self._positions)

    @cached_property
    def groups(self) -> list[Group]:
        """Neighbouring requests with equal row counts."""
        groups: list[Group] = []
        first_row = 0
        for request, count in enumerate(self.counts):
            last = groups[-1] if groups else None
            if last is not None and last.num_rows == count:
                groups[-1] = Group(last.first_request, last.num_requests + 1, last.first_row, count)
            else:
                groups.append(Group(request, 1, first_row, count))
            first_row += count
        return groups

    def commit(self, ring_rows: int) -> tuple[Tensor, Tensor]:
        """(step rows, ring rows) to copy: the last `ring_rows` rows of every request."""
        if ring_rows not in self._commits:
            rows = np.arange(self.num_rows)
            if self.longest > ring_rows:
                ends = (self._starts + self._counts)[self._requests]
                rows = np.flatnonzero(self._positions >= ends - ring_rows)
            ring = self._row_slots[rows] * ring_rows + self._positions[rows] % ring_rows
            self._commits[ring_rows] = (torch.from_numpy(rows), torch.from_numpy(ring))
        return self._commits[ring_rows]

    def window(self, ring_rows: int, width: int) -> HistoryTable:
        """The sliding window of every row: positions p - width + 1 .. p."""
        key = (ring_rows, width)
        if key not in self._windows:
            self._windows[key] = self._history(np.arange(self.num_rows), ring_rows, width)
        return self._windows[key]

    def _history(self, rows: Array, ring_rows: int, width: int) -> HistoryTable:
        positions = self._positions[rows][:, None] + np.arange(1 - width, 1)  # [n, width]
        local = self.longest > ring_rows - width + 1
        owners = self._requests[rows] if local else self._row_slots[rows]
        table = owners[:, None] * ring_rows + positions % ring_rows
        if local:
            offset = (self._row_starts - self._starts)[owners][:, None] + len(self.counts) * ring_rows
            table = np.where(positions < self._starts[owners][:, None], table, positions + offset)
        return HistoryTable(torch.from_numpy(np.where(positions >= 0, table, -1)), local)

    def _entry_rows(self, requests: Array, entries: Array, ratio: int) -> Array:
        """Page rows of compressed entries; `requests` broadcasts against `entries`."""
        per_page = self.page_tokens // ratio
        return self.page_table[requests, entries // per_page] * per_page + entries % per_page

    @cached_property
    def c4_closings(self) -> Closings | None:
        """C4 entries completed by this step; None when there are none."""
        rows = np.flatnonzero((self._positions + 1) % C4 == 0)
        if len(rows) == 0:
            return None
        entries = self._positions[rows] // C4
        return Closings(
            history=self._history(rows, self._c4_ring_rows, C4_WIDTH),
            entry_rows=torch.from_numpy(self._entry_rows(self._requests[rows], entries, C4)),
            entry_ids=torch.from_numpy(entries),
        )

    @cached_property
    def c128_segments(self) -> Segments:
        """The step's rows cut at request and C128 block borders."""
        positions, requests = self._positions, self._requests
        borders = positions % C128 == 0
        borders[self._row_starts] = True
        first = np.flatnonzero(borders)
        ends = np.append(first[1:], self.num_rows) - 1
        sources = targets = self._slots[requests[first]] * self._c128_banks
        if any(self._drafts):
            drafting = (np.array(self._drafts) > 0)[requests]
            is_end = drafting.copy()
            is_end[ends] = True
            all_ends = np.flatnonzero(is_end)
            first = first[np.searchsorted(ends, all_ends)]
            ends = all_ends
            sources = self._slots[requests[ends]] * self._c128_banks
            targets = sources + np.where(drafting[ends], ends - self._row_starts[requests[ends]], 0)
        lengths = ends - first + 1
        columns = np.arange(lengths.max())
        rows = np.where(columns < lengths[:, None], first[:, None] + columns, -1)
        last = positions[ends]
        closed = (last + 1) % C128 == 0
        closing = np.flatnonzero(closed)
        entries = last[closing] // C128
        return Segments(
            rows=torch.from_numpy(rows),
            sources=torch.from_numpy(sources),
            targets=torch.from_numpy(targets),
            fresh=torch.from_numpy(positions[first] % C128 == 0),
            closing=torch.from_numpy(closing),
            open=torch.from_numpy(np.flatnonzero(~closed)),
            entry_rows=torch.from_numpy(self._entry_rows(requests[first[closing]], entries, C128)),
            entry_ids=torch.from_numpy(entries),
        )

    @cached_property
    def num_visible_c4(self) -> Tensor:
        """int64 [rows], C4 entries that each row may read: those of blocks complete up to and with it."""
        return torch.from_numpy((self._positions + 1) // C4)

    @cached_property
    def most_visible_c4(self) -> int:
        """C4 entries that the row furthest in its sequence may read."""
        return int(self._positions.max() + 1) // C4

    def all_entries(self, ratio: int) -> Tensor:
        """int64 [rows, most], page rows of all visible entries of each row, -1 beyond. For C128, which attends to all,
        and for C4 as long as nothing has to be chosen."""
        if ratio not in self._all_entries:
            visible = (self._positions + 1) // ratio
            entries = np.arange(visible.max())
            table = self._entry_rows(self._requests[:, None], entries[None, :], ratio)
            self._all_entries[ratio] = torch.from_numpy(np.where(entries < visible[:, None], table, -1))
        return self._all_entries[ratio]

    def c4_table(self, chosen: Tensor) -> Tensor:
        """Page rows int64 [rows, k] of C4 entry ids [rows, k]; -1 stays -1."""
        per_page = self.page_tokens // C4
        pages = self._row_page_table.gather(1, chosen.clamp_min(0) // per_page)
        return torch.where(chosen >= 0, pages * per_page + chosen % per_page, -1)

    @cached_property
    def _row_page_table(self) -> Tensor:
        return torch.from_numpy(self.page_table[self._requests])

    def c4_group_rows(self, group: Group) -> Tensor:
        """int64 [num_requests, most]: page rows of a group's C4 entries, as far as any of its rows may see."""
        if group not in self._group_rows:
            requests = np.arange(group.first_request, group.first_request + group.num_requests)
            visible = (self._starts[requests] + group.num_rows) // C4
            entries = np.arange(visible.max())
            table = self._entry_rows(requests[:, None], entries[None, :], C4)
            self._group_rows[group] = torch.from_numpy(np.where(entries < visible[:, None], table, -1))
        return self._group_rows[group]
