"""The oracle's step: whole sequences from position 0, explicit masks, no cache. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.compressor import pool_sequence
from dsv4_kernels.indexer import index_scores, select
from dsv4_kernels.metadata import C4
from dsv4_kernels.quant import fake_quantize_fp8
from dsv4_kernels.rope import apply_rope, rope_table
from dsv4_kernels.sparse_attention import attend
from dsv4serve.model.attention import Attention
from dsv4serve.model.compressor import Compressor
from dsv4serve.model.context import AttentionInputs, Observer

KV_GROUP = 64


class WholeSequence:
    """StepContext of `batch` sequences of `length` tokens each, at positions 0 .. length - 1; row = b * length + t."""

    def __init__(self, length: int, observer: Observer | None = None, batch: int = 1) -> None:
        self.length, self.batch = length, batch
        self.positions = torch.arange(length).repeat(batch)
        self._observer = observer
        self._ropes: dict[int, Tensor] = {}

    def rope(self, frequencies: Tensor) -> Tensor:
        """Rotations at all positions."""
        key = id(frequencies)
        if key not in self._ropes:
            self._ropes[key] = rope_table(self.positions, frequencies)
        return self._ropes[key]

    def observe(self, name: str, value: Tensor) -> None:
        """Hand a named value to the observer."""
        if self._observer is not None:
            self._observer(name, value)

    def must_select(self, top_k: int) -> bool:
        """True when the last row sees more than `top_k` C4 entries."""
        return self.length // C4 > top_k

    def attend(self, layer: Attention, inputs: AttentionInputs) -> Tensor:
        """Window and visible compressed entries under one mask."""
        keys, entries = self.keys(layer, inputs)
        positions = torch.arange(self.length)
        distance = positions.unsqueeze(1) - positions
        mask = ((distance >= 0) & (distance < layer.config.sliding_window)).expand(self.batch, -1, -1)
        if entries is not None:
            keys = torch.cat([keys, entries], dim=1)
            mask = torch.cat([mask, self.visible_entries(layer, inputs, entries.shape[1])], dim=-1)
        output = attend(self.split(inputs.q), keys, mask, layer.sink).flatten(0, 1)
        return apply_rope(output, self.rope(layer.frequencies), inverse=True)

    def split(self, rows: Tensor) -> Tensor:
        """Rows [batch * length, ..] -> [batch, length, ..]."""
        return rows.unflatten(0, (self.batch, self.length))

    def keys(self, layer: Attention, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        """Raw keys [batch, length, head_dim] and compressed entries [batch, length // ratio, head_dim] or None."""
        raw = self.split(_quantize_kv(layer, inputs.kv))
        if layer.compressor is None or inputs.compress is None:
            return raw, None
        entries = self._entries(layer, layer.compressor, inputs.compress, inputs.kv.dtype)
        return raw, _quantize_kv(layer, entries)

    def visible_entries(self, layer: Attention, inputs: AttentionInputs, num_entries: int) -> Tensor:
        """bool [batch, length, entries]: complete blocks, for C4 only the indexer's choice."""
        visible = (torch.arange(self.length) + 1) // layer.ratio
        mask = (torch.arange(num_entries) < visible.unsqueeze(1)).expand(self.batch, -1, -1)
        if inputs.index_q is None:
            return mask
        chosen = self.choose(layer, inputs, visible)
        self.observe(f"layers.{layer.index}.attn.selected", chosen.flatten(0, 1))
        picked = torch.zeros(*chosen.shape[:2], num_entries + 1, dtype=torch.bool)
        picked.scatter_(2, chosen.masked_fill(chosen < 0, num_entries), True)
        return mask & picked[..., :-1]

    def choose(self, layer: Attention, inputs: AttentionInputs, visible: Tensor) -> Tensor:
        """The indexer's choice, int64 [batch, length, k], -1 where there are fewer; `visible` entries of each row."""
        return select(self.scores(layer, inputs), visible.expand(self.batch, -1), layer.config.index_topk)

    def scores(self, layer: Attention, inputs: AttentionInputs) -> Tensor:
        """Index scores [batch, length, entries]."""
        assert layer.index_compressor is not None
        assert inputs.index_q is not None
        assert inputs.index_weights is not None
        assert inputs.index_compress is not None
        keys = self._entries(layer, layer.index_compressor, inputs.index_compress, inputs.kv.dtype)
        queries, weights = self.split(inputs.index_q), self.split(inputs.index_weights)
        return index_scores(queries, weights, layer.rotate_index(keys))

    def _entries(self, layer: Attention, compressor: Compressor, raw: Tensor, dtype: torch.dtype) -> Tensor:
        kv, gate = self.split(raw).chunk(2, dim=-1)
        pooled = pool_sequence(kv, gate, layer.ratio)
        num_entries = pooled.shape[1]
        rotations = rope_table(torch.arange(num_entries) * layer.ratio, layer.frequencies).repeat(self.batch, 1)
        return compressor.entries(pooled.flatten(0, 1), rotations, dtype).unflatten(0, (self.batch, num_entries))


def _quantize_kv(layer: Attention, kv: Tensor) -> Tensor:
    """The FP8 rounding of the first head_dim - rope dims, as the cache rows have it."""
    if not layer.quantize:
        return kv
    nope = layer.config.nope_head_dim
    return torch.cat([fake_quantize_fp8(kv[..., :nope], KV_GROUP), kv[..., nope:]], dim=-1)
