"""The engine's step: a ragged batch of requests over the paged cache, as the network's StepContext.

Per layer, in this order: store window rows, compress and store entries, select, attend. So an entry closed by a token
is visible to that token (docs/model.md section 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.compressor import online_update, pool_c4
from dsv4_kernels.indexer import select_entries
from dsv4_kernels.kv_store import Format, Planes, RowFormat, decode, encode, load, store, take_rows
from dsv4_kernels.metadata import C4, C128, HistoryTable, StepMetadata
from dsv4_kernels.rope import rope_table
from dsv4_kernels.sparse_attention import Keys, sparse_attention
from dsv4serve.memory import CachePools, LayerCache
from dsv4serve.model.attention import Attention
from dsv4serve.model.compressor import Compressor
from dsv4serve.model.context import AttentionInputs, Observer


class PagedStep:
    """StepContext of one engine step.

    Args:
        pools: the cache; rows of the step's slots and pages are written by `attend`.
        metadata: which rows; every (slot, page) named there belongs to the step's requests alone.
        observer: called with named intermediate values.
    """

    def __init__(self, pools: CachePools, metadata: StepMetadata, observer: Observer | None = None) -> None:
        self.pools, self.metadata = pools, metadata
        self._observer = observer
        self._ropes: dict[tuple[int, int], Tensor] = {}

    @property
    def positions(self) -> Tensor:
        """int64 [rows]."""
        return self.metadata.positions

    def rope(self, frequencies: Tensor) -> Tensor:
        """Rotations at the rows' positions."""
        return self._rope(frequencies, 0, self.metadata.positions)

    def _rope(self, frequencies: Tensor, ratio: int, positions: Tensor) -> Tensor:
        """Table at `positions`, which `ratio` identifies within the step: 0 = rows, else entries closed by it."""
        key = (id(frequencies), ratio)
        if key not in self._ropes:
            self._ropes[key] = rope_table(positions, frequencies)
        return self._ropes[key]

    def observe(self, name: str, value: Tensor) -> None:
        """Hand a named value to the observer."""
        if self._observer is not None:
            self._observer(name, value)

    def must_select(self, top_k: int) -> bool:
        """True when some row sees more than `top_k` C4 entries."""
        return self.metadata.most_visible_c4 > top_k

    def attend(self, layer: Attention, inputs: AttentionInputs) -> Tensor:
        """Rows in, attention output out; the cache of `layer` is advanced by the step's rows."""
        cache = self.pools.layers[layer.index]
        sources = [self._window(cache, inputs.kv)]
        if layer.ratio == C4:
            sources.append(self._c4(layer, cache, inputs))
        elif layer.ratio == C128:
            sources.append(self._c128(layer, cache, inputs))
        rotations = self.rope(layer.frequencies)
        return sparse_attention(inputs.q, sources, layer.sink, rotations)

    def keep(self, layer: int, kv: Tensor) -> None:
        """Store the rows' keys [rows, head_dim] of a layer that has no compressed rows, and nothing else."""
        cache = self.pools.layers[layer]
        source, target = self.metadata.commit(self.pools.layout.window_ring_rows)
        store(cache.window, target, encode(kv[source], cache.layout.window))

    def _window(self, cache: LayerCache, kv: Tensor) -> Keys:
        layout, ring_rows = cache.layout, self.pools.layout.window_ring_rows
        # The MTP layer's ring has room for drafts; the window itself is what the model was trained with.
        history = self.metadata.window(ring_rows, ring_rows - self.pools.layout.num_draft_tokens)
        rows = encode(kv, layout.window)
        return self._history_keys(cache.window, rows, layout.window, history, ring_rows)

    def _history_keys(
        self, ring: Planes, rows: Planes, row_format: RowFormat, history: HistoryTable, ring_rows: int
    ) -> Keys:
        """The rows of `history`; commits the step's rows to the ring (see HistoryTable)."""
        source, target = self.metadata.commit(ring_rows)
        committed = rows if len(source) == len(rows[0]) else tuple(plane[source] for plane in rows)
        if not history.local:
            store(ring, target, committed)
            return _stored_keys(history.table, ring, row_format)
        slots = self.metadata.slots
        local = tuple(
            torch.cat([plane.view(-1, ring_rows, plane.shape[1])[slots].flatten(0, 1), new])
            for plane, new in zip(ring, rows, strict=True)
        )
        values = decode(local, row_format)
        values = torch.cat([values, values.new_zeros(1, values.shape[1])])  # -1 reads the zero row
        store(ring, target, committed)
        return Keys(history.table, lambda table: take_rows(values, table), values)

    def _c4(self, layer: Attention, cache: LayerCache, inputs: AttentionInputs) -> Keys:
        assert layer.compressor is not None
        assert layer.index_compressor is not None
        layout = cache.layout
        entries = self._close_c4(layer, layer.compressor, cache.c4_state, layout.c4_state, inputs.compress, inputs)
        index_keys = self._close_c4(
            layer, layer.index_compressor, cache.index_state, layout.index_state, inputs.index_compress, inputs
        )
        assert cache.entries is not None
        assert cache.index is not None
        assert layout.entry is not None
        assert layout.index is not None
        if entries is not None and index_keys is not None:
            closings = self.metadata.c4_closings
            assert closings is not None
            store(cache.entries, closings.entry_rows, encode(entries, layout.entry))
            store(cache.index, closings.entry_rows, encode(layer.rotate_index(index_keys), layout.index))
        if inputs.index_q is None or inputs.index_weights is None:
            return self._entry_keys(cache, self.metadata.all_entries(C4))
        chosen = self._select(layer, cache.index, layout.index, inputs.index_q, inputs.index_weights)
        self.observe(f"layers.{layer.index}.attn.selected", chosen)
        return self._entry_keys(cache, self.metadata.c4_table(chosen))

    def _close_c4(
        self,
        layer: Attention,
        compressor: Compressor,
        ring: Planes | None,
        row_format: RowFormat | None,
        raw: Tensor | None,
        inputs: AttentionInputs,
    ) -> Tensor | None:
        """Advance a C4 state ring by the step's raw rows; entries [closed, d] that the step completes, or None."""
        assert ring is not None
        assert row_format is not None
        assert raw is not None
        closings = self.metadata.c4_closings
        rows = encode(raw, row_format)
        ring_rows = self.pools.layout.c4_ring_rows
        if closings is None:
            _, target = self.metadata.commit(ring_rows)
            store(ring, target, rows)
            return None
        history = self._history_keys(ring, rows, row_format, closings.history, ring_rows)
        pooled = pool_c4(history.read(history.table), history.table >= 0)
        rotations = self._rope(layer.frequencies, C4, closings.entry_ids * C4)
        return compressor.entries(pooled, rotations, inputs.kv.dtype)

    def _select(self, layer: Attention, index: Planes, row_format: RowFormat, q: Tensor, weights: Tensor) -> Tensor:
        """Chosen entry ids int64 [rows, k], -1 = none."""
        metadata, top_k = self.metadata, layer.config.index_topk
        visible = metadata.num_visible_c4
        chosen = []
        for group in metadata.groups:
            shape = (group.num_requests, group.num_rows)
            rows = slice(group.first_row, group.first_row + shape[0] * shape[1])
            entry_rows = metadata.c4_group_rows(group)
            keys = load(index, entry_rows, row_format)
            ids = select_entries(
                q[rows].unflatten(0, shape),
                weights[rows].unflatten(0, shape),
                keys,
                visible[rows].view(shape),
                top_k,
            ).flatten(0, 1)
            chosen.append(ids)
        width = max(ids.shape[1] for ids in chosen)
        return torch.cat([torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=-1) for ids in chosen])

    def _c128(self, layer: Attention, cache: LayerCache, inputs: AttentionInputs) -> Keys:
        compressor, raw, segments = layer.compressor, inputs.compress, self.metadata.c128_segments
        assert compressor is not None
        assert raw is not None
        assert cache.c128_state is not None
        state = cache.c128_state.flatten(0, 1)
        kv, gate = raw[segments.rows].chunk(2, dim=-1)
        updated = online_update(state[segments.sources], segments.fresh, kv, gate, segments.rows >= 0)
        if len(segments.closing):
            assert cache.entries is not None
            assert cache.layout.entry is not None
            pooled = updated[segments.closing, 2]
            rotations = self._rope(layer.frequencies, C128, segments.entry_ids * C128)
            entries = compressor.entries(pooled, rotations, inputs.kv.dtype)
            store(cache.entries, segments.entry_rows, encode(entries, cache.layout.entry))
            state[segments.targets[segments.open]] = updated[segments.open]
        else:
            state[segments.targets] = updated
        return self._entry_keys(cache, self.metadata.all_entries(C128))

    def _entry_keys(self, cache: LayerCache, table: Tensor) -> Keys:
        planes, row_format = cache.entries, cache.layout.entry
        assert planes is not None
        assert row_format is not None
        return _stored_keys(table, planes, row_format)


def _stored_keys(table: Tensor, planes: Planes, row_format: RowFormat) -> Keys:
    """Keys that lie in the cache."""
    values = decode(planes, row_format) if row_format.format is Format.F32 else None
    return Keys(table, lambda rows: load(planes, rows, row_format), values)
