"""Byte layout of the cache: what one slot, one page and one tail hold in each layer. Torch-free arithmetic on formats.

- Slot: constant per running request. Window ring, C4 and C4-indexer state rings, running C128 state, stream vector.
- Page: 256 token positions of what grows: 64 C4 rows, 64 indexer rows, 2 C128 rows.
- Tail: a copy of a slot's rings at a page boundary. A boundary also ends a C128 block, so no C128 state is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_kernels.kv_store import Format, RowFormat
from dsv4_kernels.metadata import C4, C4_WIDTH, C128
from dsv4serve.config import ModelConfig, Numerics
from dsv4serve.types import PAGE_TOKENS

C128_STATE_ROWS = 3  # running max, sum, weighted mean


@dataclass(frozen=True)
class LayerLayout:
    """Formats of one layer. None where its ratio has no such rows."""

    ratio: int
    window: RowFormat
    c4_state: RowFormat | None  # kv early | kv current | gate early | gate current, raw float32
    index_state: RowFormat | None  # the same for the indexer's compressor
    c128_state_dim: int  # head_dim for C128 layers, else 0
    entry: RowFormat | None
    index: RowFormat | None

    @property
    def entries_per_page(self) -> int:
        """Compressed rows that one page holds in this layer."""
        return PAGE_TOKENS // self.ratio if self.ratio else 0


@dataclass(frozen=True)
class CacheLayout:
    """Formats and byte counts of all layers, main layers first, then the MTP block if drafts are served."""

    layers: tuple[LayerLayout, ...]
    window_ring_rows: int
    c4_ring_rows: int
    num_draft_tokens: int
    stream_bytes: int  # the main model's streams of a slot's last position; 0 without drafts

    @property
    def c128_banks(self) -> int:
        """Running C128 states of a slot: the committed one, which is also that behind a step's first row, and one
        behind each draft."""
        return 1 + self.num_draft_tokens

    @classmethod
    def build(cls, model: ModelConfig, numerics: Numerics, num_draft_tokens: int = 0) -> CacheLayout:
        """Layout for a model. `num_draft_tokens` > 0 adds the MTP layer and room for rejected drafts in the rings."""
        exact = numerics is Numerics.EXACT
        ratios = model.layer_ratios + ((0,) if num_draft_tokens else ())
        return cls(
            layers=tuple(_layer(model, ratio, exact) for ratio in ratios),
            window_ring_rows=model.sliding_window + num_draft_tokens,
            c4_ring_rows=C4_WIDTH * (2 if num_draft_tokens else 1),
            num_draft_tokens=num_draft_tokens,
            stream_bytes=model.hc_mult * model.hidden_size * (4 if exact else 2) if num_draft_tokens else 0,
        )

    @property
    def ring_bytes(self) -> int:
        """Bytes of a slot's rings and stream vector, which is what a tail copies."""
        total = self.stream_bytes
        for layer in self.layers:
            total += self.window_ring_rows * layer.window.row_bytes
            for state in (layer.c4_state, layer.index_state):
                total += self.c4_ring_rows * state.row_bytes if state else 0
        return total

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: rings and the C128 states (one bank, plus one per draft)."""
        states = sum(4 * C128_STATE_ROWS * layer.c128_state_dim for layer in self.layers)
        return self.ring_bytes + self.c128_banks * states

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        total = 0
        for layer in self.layers:
            for rows in (layer.entry, layer.index):
                total += layer.entries_per_page * rows.row_bytes if rows else 0
        return total

    @property
    def tail_bytes(self) -> int:
        """Bytes of one tail."""
        return self.ring_bytes


def _layer(model: ModelConfig, ratio: int, exact: bool) -> LayerLayout:
    kv = Format.F32 if exact else Format.KV_FP8
    index = Format.F32 if exact else Format.INDEX_FP4
    main = RowFormat(kv, model.head_dim, model.qk_rope_head_dim)
    is_c4 = ratio == C4
    return LayerLayout(
        ratio=ratio,
        window=main,
        c4_state=RowFormat(Format.F32, 4 * model.head_dim) if is_c4 else None,
        index_state=RowFormat(Format.F32, 4 * model.index_head_dim) if is_c4 else None,
        c128_state_dim=model.head_dim if ratio == C128 else 0,
        entry=main if ratio else None,
        index=RowFormat(index, model.index_head_dim) if is_c4 else None,
    )
