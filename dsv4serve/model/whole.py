"""The oracle's step: one whole sequence from position 0, explicit masks, no cache. Differentiable."""

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
    """StepContext of `length` tokens at positions 0 .. length - 1."""

    def __init__(self, length: int, observer: Observer | None = None) -> None:
        self.positions = torch.arange(length)
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
        return len(self.positions) // C4 > top_k

    def attend(self, layer: Attention, inputs: AttentionInputs) -> Tensor:
        """Window and visible compressed entries under one mask."""
        config, positions = layer.config, self.positions
        distance = positions.unsqueeze(1) - positions
        keys = _quantize_kv(layer, inputs.kv)
        mask = (distance >= 0) & (distance < config.sliding_window)
        if layer.compressor is not None and inputs.compress is not None:
            entries = _quantize_kv(layer, _entries(layer, layer.compressor, inputs.compress, inputs.kv.dtype))
            keys = torch.cat([keys, entries])
            mask = torch.cat([mask, self._visible_entries(layer, inputs, len(entries))], dim=1)
        output = attend(inputs.q, keys, mask, layer.sink)
        return apply_rope(output, self.rope(layer.frequencies), inverse=True)

    def _visible_entries(self, layer: Attention, inputs: AttentionInputs, num_entries: int) -> Tensor:
        """bool [rows, entries]: complete blocks, for C4 only the indexer's choice."""
        visible = (self.positions + 1) // layer.ratio
        mask = torch.arange(num_entries) < visible.unsqueeze(1)
        if layer.index_compressor is None or inputs.index_q is None or inputs.index_weights is None:
            return mask
        assert inputs.index_compress is not None
        index_keys = layer.rotate_index(_entries(layer, layer.index_compressor, inputs.index_compress, inputs.kv.dtype))
        scores = index_scores(inputs.index_q.unsqueeze(0), inputs.index_weights.unsqueeze(0), index_keys.unsqueeze(0))
        chosen = select(scores, visible.unsqueeze(0), layer.config.index_topk)[0]
        self.observe(f"layers.{layer.index}.attn.selected", chosen)
        picked = torch.zeros(len(chosen), num_entries + 1, dtype=torch.bool)
        picked.scatter_(1, chosen.masked_fill(chosen < 0, num_entries), True)
        return mask & picked[:, :-1]


def _entries(layer: Attention, compressor: Compressor, raw: Tensor, dtype: torch.dtype) -> Tensor:
    kv, gate = raw.chunk(2, dim=-1)
    pooled = pool_sequence(kv, gate, layer.ratio)
    rotations = rope_table(torch.arange(len(pooled)) * layer.ratio, layer.frequencies)
    return compressor.entries(pooled, rotations, dtype)


def _quantize_kv(layer: Attention, kv: Tensor) -> Tensor:
    """The FP8 rounding of the first head_dim - rope dims, as the cache rows have it."""
    if not layer.quantize:
        return kv
    nope = layer.config.nope_head_dim
    return torch.cat([fake_quantize_fp8(kv[:, :nope], KV_GROUP), kv[:, nope:]], dim=-1)
