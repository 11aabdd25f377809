"""The training step's context: whole sequences with attention in blocks, and what training wants to know of a step."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsv4_kernels.rope import apply_rope
from dsv4_kernels.sparse_attention import attend
from dsv4serve.model.attention import Attention
from dsv4serve.model.context import AttentionInputs
from dsv4serve.model.whole import WholeSequence


class TrainingStep(WholeSequence):
    """`batch` sequences of `length` tokens (a multiple of the window), the same mathematics as WholeSequence.

    Queries of one window-sized block see only their own and the previous block, so scores take
    length * (2 * window + entries) instead of length * (length + entries).

    Args:
        select: C4 layers see what the indexer chooses; otherwise all complete entries, while the indexer learns.
        num_taught: in so many sequences of the batch the indexer is compared with the attention it should predict.

    After the forward pass `loads` has the tokens per expert int64 [E] by MoE name, and `index_losses` one scalar per
    C4 layer: KL divergence, in nats per row, from the attention's distribution over visible entries (all heads
    together) to the softmax of the index scores.
    """

    def __init__(self, batch: int, length: int, num_experts: int, select: bool, num_taught: int) -> None:
        super().__init__(length, batch=batch)
        self.select, self.num_taught, self._num_experts = select, num_taught, num_experts
        self.loads: dict[str, Tensor] = {}
        self.index_losses: list[Tensor] = []
        self._scores: dict[int, Tensor] = {}

    def must_select(self, top_k: int) -> bool:
        """Always: the indexer learns also where all entries could be taken."""
        return True

    def observe(self, name: str, value: Tensor) -> None:
        """Count the experts' loads."""
        if name.endswith(".experts"):
            ids = value.flatten()  # not bincount, which waits for the device
            loads = ids.new_zeros(self._num_experts).scatter_add_(0, ids, torch.ones_like(ids))
            self.loads[name.removesuffix(".experts")] = loads

    def attend(self, layer: Attention, inputs: AttentionInputs) -> Tensor:
        """Blockwise attention; the index loss on the side."""
        window = layer.config.sliding_window
        keys, entries = self.keys(layer, inputs)
        blocks = keys.unflatten(1, (-1, window))
        num_blocks = blocks.shape[1]
        before = torch.cat([torch.zeros_like(blocks[:, :1]), blocks[:, :-1]], dim=1)
        keys = torch.cat([before, blocks], dim=2)  # [batch, blocks, 2 * window, head_dim]
        mask = _window_mask(num_blocks, window).expand(self.batch, -1, -1, -1)
        queries = self.split(inputs.q).unflatten(1, (num_blocks, window))
        visible = None
        if entries is not None:
            visible = self.visible_entries(layer, inputs, entries.shape[1])
            keys = torch.cat([keys, entries.unsqueeze(1).expand(-1, num_blocks, -1, -1)], dim=2)
            mask = torch.cat([mask, visible.unflatten(1, (num_blocks, window))], dim=-1)
        output = attend(queries, keys, mask, layer.sink).flatten(0, 2)
        if layer.index_compressor is not None and visible is not None and self.num_taught:
            taught = slice(self.num_taught)
            mass = _mass(queries[taught], keys[taught], mask[taught], layer.sink, 2 * window).flatten(1, 2)
            self.index_losses.append(_index_loss(self.scores(layer, inputs)[taught], mass, visible[taught]))
        return apply_rope(output, self.rope(layer.frequencies), inverse=True)

    def visible_entries(self, layer: Attention, inputs: AttentionInputs, num_entries: int) -> Tensor:
        """bool [batch, length, entries]; before the indexer is trained all complete entries."""
        if not self.select:
            inputs = dataclasses.replace(inputs, index_q=None)
        return super().visible_entries(layer, inputs, num_entries)

    def scores(self, layer: Attention, inputs: AttentionInputs) -> Tensor:
        """Index scores, computed once for the choice and the loss."""
        if layer.index not in self._scores:
            self._scores[layer.index] = super().scores(layer, inputs)
        return self._scores[layer.index]


def _window_mask(num_blocks: int, window: int) -> Tensor:
    """bool [blocks, window, 2 * window]: row i of a block sees itself and the window - 1 positions before it."""
    row, column = torch.arange(window).unsqueeze(1), torch.arange(2 * window)
    inside = (column > row) & (column <= row + window)
    first = inside & (column >= window)  # nothing lies before the first block
    return torch.cat([first.unsqueeze(0), inside.expand(num_blocks - 1, -1, -1)])


@torch.no_grad()
def _mass(queries: Tensor, keys: Tensor, mask: Tensor, sink: Tensor, first: int) -> Tensor:
    """Attention given to the keys from `first` on, summed over heads: f32 [.., rows, keys - first]."""
    num_heads = queries.shape[-2]
    scores = torch.matmul(queries.float().flatten(-3, -2), keys.float().transpose(-1, -2)) * queries.shape[-1] ** -0.5
    scores = scores.unflatten(-2, (-1, num_heads)).masked_fill(~mask.unsqueeze(-2), -torch.inf)
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sink.view(-1, 1))
    return torch.exp(scores[..., first:] - total).sum(dim=-2)


def _index_loss(scores: Tensor, mass: Tensor, visible: Tensor) -> Tensor:
    """Mean KL divergence over the rows that see an entry: scores, mass f32 and visible bool [n, rows, entries]."""
    target = mass / mass.sum(-1, keepdim=True).clamp_min(1e-9)
    guess = torch.log_softmax(scores.float().masked_fill(~visible, -1e9), dim=-1)
    divergence = (target * (target.clamp_min(1e-9).log() - guess)).sum(-1)
    seen = visible.any(-1)
    return (divergence * seen).sum() / seen.sum().clamp_min(1)
