"""What a request's sampling parameters and its history change in its logits before a token is drawn.

In this order: penalties, bias, bans. A grammar's mask comes after them. Requests that ask for nothing have no
RowAdjustment and cost nothing; the others touch single logits, never a whole row, but for the one that forces a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_kernels.sampling import LOWEST, add_bias, ban, penalise
from dsv4serve.types import SamplingParams, SlotStart


class RowAdjustment:
    """The adjustments of one request. Built from the ids known at a slot's start, so a retraction changes nothing."""

    def __init__(self, start: SlotStart, eos_token_id: int) -> None:
        params, num_prompt = start.sampling, start.num_prompt_tokens
        self.params = params
        self.outputs = start.token_ids[num_prompt:]  # only if params.needs_history
        self._num_outputs = start.num_output_tokens
        stops = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, eos_token_id)
        self._early_stops = list(stops)
        self.bias = (list(params.logit_bias), list(params.logit_bias.values()))  # ids, and what to add to their logits
        self._in_reasoning = params.thinking_budget is not None and not set(self.outputs) & set(params.thinking_end_ids)
        self.has_penalty = _has_penalty(params)
        self.counts: dict[int, int] = {}  # of penalised tokens: how often the output has them
        if params.repetition_penalty != 1.0:
            self.counts = dict.fromkeys(start.token_ids[:num_prompt], 0)
        if self.has_penalty:
            for token in self.outputs:
                self.counts[token] = self.counts.get(token, 0) + 1

    def append(self, token: int) -> None:
        """Take the token that was drawn."""
        self._num_outputs += 1
        if self.params.needs_history:
            self.outputs.append(token)
        if self.has_penalty:
            self.counts[token] = self.counts.get(token, 0) + 1
        if token in self.params.thinking_end_ids:
            self._in_reasoning = False

    @property
    def banned(self) -> list[int]:
        """Ids that cannot be drawn now: what the request bans, what would end it too early or complete a bad word."""
        ids = list(self.params.banned_token_ids)
        if self._num_outputs < self.params.min_tokens:
            ids += self._early_stops
        for *head, last in self.params.bad_words:
            if not head or self.outputs[-len(head) :] == head:
                ids.append(last)
        return ids

    @property
    def forced(self) -> int | None:
        """The only id that can be drawn now, if there is one: the end of a reasoning whose budget is used up."""
        budget = self.params.thinking_budget
        if budget is None or not self._in_reasoning or self._num_outputs < budget:
            return None
        return self.params.thinking_end_ids[0]


def row_adjustment(start: SlotStart, eos_token_id: int) -> RowAdjustment | None:
    """The adjustments of the request that takes a slot; None when it has none."""
    params = start.sampling
    wanted = (
        _has_penalty(params)
        or params.logit_bias
        or params.banned_token_ids
        or params.bad_words
        or params.thinking_budget is not None
        or params.min_tokens > start.num_output_tokens
    )
    return RowAdjustment(start, eos_token_id) if wanted else None


def adjust(logits: Tensor, adjustments: Sequence[RowAdjustment | None]) -> None:
    """Change float32 logits [B, V] in place, row b by adjustments[b]."""
    rows = [(row, adjustment) for row, adjustment in enumerate(adjustments) if adjustment is not None]
    if not rows:
        return
    _penalise(logits, [(row, adjustment) for row, adjustment in rows if adjustment.counts])
    places: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for row, adjustment in rows:
        biased, amounts = adjustment.bias
        places += [row] * len(biased)
        ids += biased
        values += amounts
    if ids:
        add_bias(logits, torch.tensor(places), torch.tensor(ids), torch.tensor(values))
    places, ids = [], []
    for row, adjustment in rows:
        banned = adjustment.banned
        places += [row] * len(banned)
        ids += banned
    if ids:
        ban(logits, torch.tensor(places), torch.tensor(ids))
    for row, adjustment in rows:
        forced = adjustment.forced
        if forced is not None:
            logits[row] = LOWEST
            logits[row, forced] = 0.0


def _penalise(logits: Tensor, rows: list[tuple[int, RowAdjustment]]) -> None:
    if not rows:
        return
    lengths = torch.tensor([len(adjustment.counts) for _, adjustment in rows])
    params = [adjustment.params for _, adjustment in rows]
    penalise(
        logits,
        rows=torch.tensor([row for row, _ in rows]).repeat_interleave(lengths),
        token_ids=torch.tensor([token for _, adjustment in rows for token in adjustment.counts]),
        counts=torch.tensor([count for _, adjustment in rows for count in adjustment.counts.values()]),
        repetition=torch.tensor([p.repetition_penalty for p in params]).repeat_interleave(lengths),
        frequency=torch.tensor([p.frequency_penalty for p in params]).repeat_interleave(lengths),
        presence=torch.tensor([p.presence_penalty for p in params]).repeat_interleave(lengths),
    )


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
