"""A step of the engine on a GPU: what the attention layers do with the cache, by kernels that address it themselves.

Per layer: window rows to the step's own rows and, where they fit, to the ring; entries that the step closes; selection;
attention; window rows that had to wait, to the ring. The cache is that of `PagedStep`, byte for byte.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.compressor.beside import prepare_rows
from dsv4_kernels.compressor.triton import C4Compressor, C128Compressor
from dsv4_kernels.gemm.fp8 import Fp8Rows
from dsv4_kernels.gemm.queries import make_queries
from dsv4_kernels.indexer.queries import prepare_queries
from dsv4_kernels.indexer.triton import select
from dsv4_kernels.kv_store import Planes, RowFormat
from dsv4_kernels.kv_store.triton import commit, prepare_q, store_kv
from dsv4_kernels.metadata import C4, C128, Rows
from dsv4_kernels.norm.triton import rms_norm_fp8
from dsv4_kernels.rope.triton import rope_tables
from dsv4_kernels.sparse_attention.triton import sparse_attention
from dsv4serve.memory import CachePools, LayerCache
from dsv4serve.model.device import DeviceAttention
from dsv4serve.types import PAGE_TOKENS


class PagedDeviceStep:
    """The DeviceStep over the cache.

    Args:
        pools: the cache, official formats, on the device of `rows`.
        rows: of the step; every slot and page that they name belongs to the step's requests alone.
        page_table: int32 [slots, pages].
        fits_rings: no request has more rows than one and the drafts of a verify. So many a ring takes before attention
            (`ring_room`); no window row has to wait for `commit`, which is left out.
        rotations: at the rows' positions, where they are known and all layers of the step have the same frequencies.
    """

    def __init__(
        self,
        pools: CachePools,
        rows: Rows,
        page_table: Tensor,
        fits_rings: bool = False,
        rotations: Tensor | None = None,
    ) -> None:
        self.rows, self._pools, self._page_table = rows, pools, page_table
        self._fits_rings, self._given = fits_rings, rotations
        self._rotations: dict[int, dict[int, Tensor]] = {}  # of the layers with these frequencies, by ratio
        num_rows = len(rows.positions)
        widths = pools.layout.layers[0].window.plane_bytes
        # Of the step alone; one for all layers, because they follow each other.
        self._step_planes: Planes = tuple(
            torch.empty(num_rows, width, dtype=torch.uint8, device=page_table.device) for width in widths
        )

    @property
    def positions(self) -> Tensor:
        """int32 [rows]."""
        return self.rows.positions

    def prepare(self, layer: DeviceAttention, latent: Tensor, raw: Tensor | None) -> Fp8Rows:
        """See `DeviceStep.prepare`."""
        config, cache = layer.config, self._pools.layers[layer.index]
        query, kv = latent[:, : config.q_lora_rank], latent[:, config.q_lora_rank :]
        if not layer.ratio:
            self._store(layer, kv)
            return rms_norm_fp8(query, layer.q_norm, config.rms_norm_eps)
        of_ratio = self._c4 if layer.ratio == C4 else self._c128
        return prepare_rows(
            query,
            layer.q_norm,
            *self._window(layer, kv),
            of_ratio(layer, cache, _present(raw)),
            self._rotate(layer, layer.ratio),
            self._page_table,
            PAGE_TOKENS,
        )

    def attend(self, layer: DeviceAttention, queries: Tensor, raw: Tensor | None) -> Tensor:
        """See `DeviceStep.attend`."""
        config, rotations = layer.config, self._rotate(layer, 1)
        num_heads, head_dim, eps = config.num_attention_heads, config.head_dim, config.rms_norm_eps
        if layer.ratio != C4:
            heads = queries.unflatten(1, (num_heads, head_dim))
            return self._attend(layer, prepare_q(heads, eps, rotations, self.rows))
        weights, scale = self._index_weights(layer, _present(raw)), layer.index_weight_scale
        return self._attend(
            layer, *prepare_queries(queries, num_heads, head_dim, eps, weights, scale, rotations, self.rows)
        )

    def attend_few(self, layer: DeviceAttention, latent: Tensor, raw: Tensor | None, normed: Fp8Rows) -> Tensor:
        """See `DeviceStep.attend_few`."""
        config, cache = layer.config, self._pools.layers[layer.index]
        compressors, weights = None, None
        if layer.ratio == C4:
            compressors, weights = self._c4(layer, cache, _present(raw)), self._index_weights(layer, _present(raw))
        elif layer.ratio:
            compressors = self._c128(layer, cache, _present(raw))
        queries = make_queries(
            normed,
            layer.w_query,
            config.num_attention_heads,
            *self._window(layer, latent[:, config.q_lora_rank :]),
            compressors,
            self._rotate(layer, layer.ratio or 1),
            self._page_table,
            PAGE_TOKENS,
            weights,
            layer.index_weight_scale,
        )
        return self._attend(layer, *queries)

    def _attend(self, layer: DeviceAttention, q: Tensor, *index: Tensor) -> Tensor:
        """Select, attend, and store what had to wait. q: bf16 [rows, heads, head_dim]; index: queries and weights."""
        cache = self._pools.layers[layer.index]
        output = sparse_attention(
            q,
            self.rows,
            self._step_planes,
            cache.window,
            self._pools.layout.window_ring_rows,
            layer.config.sliding_window,
            layer.sink,
            self._rotate(layer, 1),
            entry_planes=cache.entries,
            page_table=self._page_table if layer.ratio else None,
            ratio=layer.ratio,
            page_tokens=PAGE_TOKENS,
            chosen=self._select(layer, cache, *index) if index else None,
        )
        self._commit(layer)
        return output

    def keep(self, layer: DeviceAttention, kv: Tensor) -> None:
        """See `DeviceStep.keep`."""
        self._store(layer, kv)
        self._commit(layer)

    def _store(self, layer: DeviceAttention, kv: Tensor) -> None:
        """Window rows to the step's own rows and, where they fit, to the ring."""
        store_kv(*self._window(layer, kv))

    def _window(self, layer: DeviceAttention, kv: Tensor) -> tuple[Any, ...]:
        """Arguments of `store_kv`."""
        config, ring = layer.config, self._pools.layers[layer.index].window
        ring_rows, window = self._pools.layout.window_ring_rows, config.sliding_window
        rotations, eps = self._rotate(layer, 1), config.rms_norm_eps
        return kv, layer.kv_norm, eps, rotations, self.rows, self._step_planes, ring, ring_rows, window

    def _commit(self, layer: DeviceAttention) -> None:
        """The other window rows to the ring."""
        if not self._fits_rings:
            ring, layout = self._pools.layers[layer.index].window, self._pools.layout
            commit(self.rows, self._step_planes, ring, layout.window_ring_rows, layer.config.sliding_window)

    def _select(self, layer: DeviceAttention, cache: LayerCache, index_q: Tensor, weights: Tensor) -> Tensor:
        """Entries that each row attends to: int32 [rows, index_topk]."""
        index, row_format = _present(cache.index), _present(cache.layout.index)
        top_k = layer.config.index_topk
        return select(index_q, weights, self.rows, index, row_format, self._page_table, PAGE_TOKENS, top_k)

    def _index_weights(self, layer: DeviceAttention, raw: Tensor) -> Tensor:
        """Weights of the index heads, f32 [rows, index_heads], behind the columns of both compressors."""
        return raw[:, 4 * (layer.config.head_dim + layer.config.index_head_dim) :]

    def _c4(self, layer: DeviceAttention, cache: LayerCache, raw: Tensor) -> tuple[C4Compressor, C4Compressor]:
        """The compressors of the entries and of the index keys."""
        config, layout = layer.config, cache.layout
        width, index_width = 4 * config.head_dim, 4 * config.index_head_dim
        index_raw = raw[:, width : width + index_width]
        return (
            self._c4_compressor(layer.compressor, raw[:, :width], cache.c4_state, cache.entries, layout.entry),
            self._c4_compressor(layer.index_compressor, index_raw, cache.index_state, cache.index, layout.index),
        )

    def _c4_compressor(
        self,
        compressor: tuple[Tensor, Tensor] | None,
        raw: Tensor,
        state: Planes | None,
        planes: Planes | None,
        row_format: RowFormat | None,
    ) -> C4Compressor:
        ape, norm = _present(compressor)
        ring = _present(state)[0].view(torch.float32)
        ring = ring.view(-1, self._pools.layout.c4_ring_rows, ring.shape[1])
        return C4Compressor(raw, ape, norm, ring, _present(planes), _present(row_format))

    def _c128(self, layer: DeviceAttention, cache: LayerCache, raw: Tensor) -> C128Compressor:
        ape, norm = _present(layer.compressor)
        planes, row_format = _present(cache.entries), _present(cache.layout.entry)
        return C128Compressor(raw, ape, norm, _present(cache.c128_state), planes, row_format)

    def _rotate(self, layer: DeviceAttention, ratio: int) -> Tensor:
        """Rotations at the rows' positions, rounded down to the first one of their block of `ratio`."""
        if self._given is not None and ratio == 1:
            return self._given
        key = id(layer.frequencies)
        if key not in self._rotations:
            ratios = (1, C4, C128) if layer.ratio else (1,)
            tables = rope_tables(self.positions, layer.frequencies, ratios)
            self._rotations[key] = dict(zip(ratios, tables, strict=True))
        return self._rotations[key][ratio]


def _present(value: Any) -> Any:
    """What a layer of this ratio has."""
    assert value is not None
    return value
