"""The MTP block over the cache of its own layer.

Row i of the block takes the main model's streams of position i and token i + 1, so it always stands one position behind
the main model. Between steps a slot that has computed n positions has the block's keys of the rows up to n - 2 and the
main model's streams of position n - 1: row n - 1 waits for the token that is chosen next. That is all that is kept, in
tails too, and it is the same after a prefill chunk, a decode, a verify and a prefix hit.

A chained draft takes the block's own output streams in place of the main model's. The keys that such rows leave in the
ring are overwritten by `follow` with those of the main model's streams, or lie behind the slot's positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv4serve.memory import CachePools
from dsv4serve.model.context import StepContext
from dsv4serve.model.transformer import Transformer


class MtpStep(StepContext, Protocol):
    """A step that can also store keys alone."""

    def keep(self, layer: int, kv: Tensor) -> None:
        """Store the rows' keys [rows, head_dim]."""


StepFactory = Callable[[list[int], list[int], list[int]], MtpStep]  # slots, first positions, numbers of rows


@dataclass(frozen=True)
class Advance:
    """What one request advanced by in a step of the main model."""

    slot: int
    start: int  # position of its first row
    count: int  # positions that stay: a chunk, or one and the accepted drafts
    first_row: int  # in the step
    has_drafted: bool  # the block's row before `start` was computed to draft


class MtpChain:
    """Drafts, and keeps the block's cache up to date.

    Args:
        transformer: a model with an MTP block.
        pools: a cache with room for drafts.
        make_step: gives the step of some rows of the block.
    """

    def __init__(self, transformer: Transformer, pools: CachePools, make_step: StepFactory) -> None:
        assert transformer.mtp is not None
        self._mtp, self._pools, self._make_step = transformer.mtp, pools, make_step
        self._hc_mult, self._dtype = transformer.config.hc_mult, transformer.dtype
        self._layer, self._window = transformer.config.num_hidden_layers, transformer.config.sliding_window

    def draft(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        token_ids: Sequence[int],
        counts: Sequence[int],
        choose: Callable[[list[int], Tensor], Tensor],
    ) -> None:
        """Make counts[b] >= 1 drafts for each slot, one pass of the block for all first ones, then all second ones.

        Args:
            starts: positions that each slot has computed, at least 1.
            token_ids: the token at that position.
            choose: from places in the batch and float32 logits [n, vocab] of their drafts to the drafts int64 [n].
        """
        batch = list(range(len(slots)))
        streams = self._pools.load_streams(torch.tensor(slots), self._hc_mult, self._dtype)
        ids = torch.tensor(token_ids)
        for place in range(max(counts)):
            going = [row for row, request in enumerate(batch) if counts[request] > place]
            if len(going) < len(batch):
                streams, ids, batch = streams[going], ids[going], [batch[row] for row in going]
            step = self._make_step(
                [slots[request] for request in batch],
                [starts[request] - 1 + place for request in batch],
                [1] * len(batch),
            )
            streams = self._mtp.advance(streams, ids, step)
            ids = choose(batch, self._mtp.logits(streams))

    def follow(self, advances: Sequence[Advance], streams: Tensor, token_ids: Tensor) -> None:
        """Bring the block's keys up to where the main model is, and remember the streams there.

        Args:
            streams: [rows, c, hidden] of the main model's step, of which each request's first `count` rows stay.
            token_ids: int64 [rows], the step's input tokens.
        """
        slots, starts, counts = [], [], []
        sources: list[int] = []  # rows of the streams before the step, then of the step's
        tokens: list[int] = []
        for index, each in enumerate(advances):
            # The rows start - 1 .. start + count - 2; row -1 does not exist, and no more than a window is ever read.
            skipped = max(int(each.has_drafted or each.start == 0), each.count - self._window)
            if skipped < each.count:
                slots.append(each.slot)
                starts.append(each.start - 1 + skipped)
                counts.append(each.count - skipped)
                first = len(advances) + each.first_row - 1
                sources += range(first + skipped, first + each.count)
                tokens += range(each.first_row + skipped, each.first_row + each.count)
                if skipped == 0:
                    sources[-each.count] = index
        own = torch.tensor([each.slot for each in advances])
        if slots:
            stored = self._pools.load_streams(own, self._hc_mult, self._dtype)
            step = self._make_step(slots, starts, counts)
            keys = self._mtp.keys(torch.cat([stored, streams])[sources], token_ids[tokens], step)
            step.keep(self._layer, keys)
        self._pools.store_streams(own, streams[[each.first_row + each.count - 1 for each in advances]])
