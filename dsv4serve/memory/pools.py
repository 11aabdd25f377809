"""The tensors behind slots, pages and tails.

Every pool has one extra row group at its end that stays zero: row number -1, a masked read, lands there. Rows are
handed out by the scheduler's bookkeeping; here is only storage and the three copies a slot needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.kv_store import Planes, RowFormat
from dsv4serve.memory.layout import C128_STATE_ROWS, CacheLayout, LayerLayout


@dataclass(frozen=True)
class LayerCache:
    """Cache tensors of one layer; planes are uint8 [rows, bytes], see `LayerLayout` for what rows hold."""

    layout: LayerLayout
    window: Planes  # slot * window_ring_rows + position % window_ring_rows
    c4_state: Planes | None  # slot * c4_ring_rows + position % c4_ring_rows
    index_state: Planes | None
    c128_state: Tensor | None  # f32 [slots + 1, banks, 3, head_dim], part of the pools' states; bank 0 is committed
    entries: Planes | None  # page * entries_per_page + entry % entries_per_page
    index: Planes | None

    def rings(self) -> list[Tensor]:
        """Planes that a tail copies."""
        return [plane for planes in (self.window, self.c4_state, self.index_state) if planes for plane in planes]


class CachePools:
    """All cache tensors of one rank.

    Args:
        layout: byte layout of the model.
        num_slots, num_pages, num_tails: how many of each; allocated here, once.
        device: where.
    """

    def __init__(
        self, layout: CacheLayout, num_slots: int, num_pages: int, num_tails: int, device: torch.device | str = "cpu"
    ) -> None:
        self.layout, self._device = layout, device
        self.num_slots, self.num_pages, self.num_tails = num_slots, num_pages, num_tails
        # Of all C128 layers, so that a commit is one copy.
        self._c128_states = self._states(num_slots)
        states = iter(self._c128_states)
        self.layers = [
            self._layer(layer, num_slots, num_pages, next(states) if layer.c128_state_dim else None)
            for layer in layout.layers
        ]
        self.streams = torch.zeros(num_slots + 1, layout.stream_bytes, dtype=torch.uint8, device=device)
        self._tail_rings = [
            [
                torch.zeros(num_tails, len(ring) // (num_slots + 1), ring.shape[1], dtype=torch.uint8, device=device)
                for ring in layer.rings()
            ]
            for layer in self.layers
        ]
        self._tail_streams = torch.zeros(num_tails, layout.stream_bytes, dtype=torch.uint8, device=device)

    def _states(self, num_slots: int) -> Tensor:
        """f32 [C128 layers, slots + 1, banks, 3, head_dim]."""
        dims = [layer.c128_state_dim for layer in self.layout.layers if layer.c128_state_dim]
        shape = (len(dims), num_slots + 1, self.layout.c128_banks, C128_STATE_ROWS, max(dims, default=0))
        return torch.zeros(shape, device=self._device)

    def _layer(self, layer: LayerLayout, num_slots: int, num_pages: int, c128_state: Tensor | None) -> LayerCache:
        def rows(row_format: RowFormat | None, num_rows: int) -> Planes | None:
            if row_format is None:
                return None
            return tuple(
                torch.zeros(num_rows, width, dtype=torch.uint8, device=self._device) for width in row_format.plane_bytes
            )

        window_rows = (num_slots + 1) * self.layout.window_ring_rows
        state_rows = (num_slots + 1) * self.layout.c4_ring_rows
        page_rows = (num_pages + 1) * layer.entries_per_page
        window = rows(layer.window, window_rows)
        assert window is not None
        return LayerCache(
            layout=layer,
            window=window,
            c4_state=rows(layer.c4_state, state_rows),
            index_state=rows(layer.index_state, state_rows),
            c128_state=c128_state,
            entries=rows(layer.entry, page_rows),
            index=rows(layer.index, page_rows),
        )

    def _slot_rings(self, slot: int) -> list[list[Tensor]]:
        """Views [ring_rows, bytes] of a slot's rings, in tail order."""
        return [
            [ring.view(self.num_slots + 1, -1, ring.shape[1])[slot] for ring in layer.rings()] for layer in self.layers
        ]

    def copy_slots(self, slots: Tensor) -> list[Tensor]:
        """What a step changes of `slots` int64 [n]; its rows of pages excepted."""
        return [plane[slots] for plane in self._slot_planes()]

    def put_slots(self, slots: Tensor, copies: list[Tensor]) -> None:
        """Put back what `copy_slots` took."""
        for plane, copied in zip(self._slot_planes(), copies, strict=True):
            plane[slots] = copied

    def _slot_planes(self) -> list[Tensor]:
        """Views [num_slots + 1, ..] of rings and C128 states."""
        rings = [ring.view(self.num_slots + 1, -1, ring.shape[1]) for layer in self.layers for ring in layer.rings()]
        return rings + [layer.c128_state for layer in self.layers if layer.c128_state is not None]

    def init_slot(self, slot: int) -> None:
        """Clear everything a slot holds, so that nothing of its last request can be read."""
        for rings in self._slot_rings(slot):
            for ring in rings:
                ring.zero_()
        self._c128_states[:, slot].zero_()
        self.streams[slot].zero_()

    def restore(self, tail: int, slot: int) -> None:
        """Make `slot` stand where the tail was taken. The C128 states are cleared: a boundary starts a new block."""
        self.init_slot(slot)
        for tails, rings in zip(self._tail_rings, self._slot_rings(slot), strict=True):
            for source, ring in zip(tails, rings, strict=True):
                ring.copy_(source[tail])
        self.streams[slot].copy_(self._tail_streams[tail])

    def commit(self, slots: Tensor, num_accepted: Tensor) -> None:
        """Make the C128 states behind the accepted drafts the committed ones: int64 [n] each, counts of a verify step.

        All else that a rejected draft wrote lies behind the slot's positions: it is overwritten before it is read.
        """
        self._c128_states[:, slots, 0] = self._c128_states[:, slots, num_accepted]

    def load_streams(self, slots: Tensor, hc_mult: int, dtype: torch.dtype) -> Tensor:
        """The main model's streams [n, hc_mult, hidden] of the last position of each of `slots`."""
        return self.streams[slots].view(dtype).unflatten(1, (hc_mult, -1))

    def store_streams(self, slots: Tensor, streams: Tensor) -> None:
        """Remember streams [n, c, hidden] of the positions at which `slots` stand now."""
        self.streams[slots] = streams.contiguous().view(torch.uint8).flatten(1)

    def snapshot(self, slot: int, tail: int) -> None:
        """Copy a slot's rings to `tail`. The slot stands at a page boundary."""
        for tails, rings in zip(self._tail_rings, self._slot_rings(slot), strict=True):
            for target, ring in zip(tails, rings, strict=True):
                target[tail].copy_(ring)
        self._tail_streams[tail].copy_(self.streams[slot])
