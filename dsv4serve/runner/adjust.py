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
        # How many outputs there were when the reasoning ended; None = it has not.
        self._ended_at = 0 if set(self.outputs) & set(params.thinking_end_ids) else None
        self.has_penalty = _has_penalty(params)
        # Of penalised tokens: how often the output has them. Those of the prompt are penalised whatever the output has.
        self._always = frozenset(start.token_ids[:num_prompt] if params.repetition_penalty != 1.0 else ())
        self.counts: dict[int, int] = dict.fromkeys(self._always, 0)
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
        if self._ended_at is None and token in self.params.thinking_end_ids:
            self._ended_at = self._num_outputs

    def undo(self, tokens: Sequence[int]) -> None:
        """Take back `tokens`, the last ones appended: they were drafts."""
        self._num_outputs -= len(tokens)
        if self.params.needs_history and tokens:
            del self.outputs[-len(tokens) :]
        if self.has_penalty:
            for token in tokens:
                self.counts[token] -= 1
                if not self.counts[token] and token not in self._always:
                    del self.counts[token]
        if self._ended_at is not None and self._ended_at > self._num_outputs:
            self._ended_at = None

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
        if budget is None or self._ended_at is not None or self._num_outputs < budget:
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


def adjust(logits: Tensor, adjustments: Sequence[RowAdjustment | None], drafts: Sequence[Sequence[int]] = ()) -> None:
    """Change float32 logits [rows, V] in place: one row for each of `adjustments`, or, where drafts[b] are given, 1 +
    len(drafts[b]) neighbouring rows, which choose the tokens behind 0, 1, .. of these drafts."""
    if all(adjustment is None for adjustment in adjustments):
        return
    changes = _Changes()
    row = 0
    for index, adjustment in enumerate(adjustments):
        ahead = drafts[index] if drafts else ()
        if adjustment is not None:
            changes.add(row, adjustment)
            for place, token in enumerate(ahead, start=1):
                adjustment.append(token)
                changes.add(row + place, adjustment)
            adjustment.undo(ahead)
        row += 1 + len(ahead)
    changes.apply(logits)


class _Changes:
    """What changes in the rows of some logits, collected row by row."""

    def __init__(self) -> None:
        self._penalised: list[tuple[int, SamplingParams, list[int], list[int]]] = []  # row, params, ids, their counts
        self._biased: list[tuple[int, int, float]] = []
        self._banned: list[tuple[int, int]] = []
        self._forced: list[tuple[int, int]] = []

    def add(self, row: int, adjustment: RowAdjustment) -> None:
        """What `adjustment` asks for now."""
        counts = adjustment.counts
        if counts:
            self._penalised.append((row, adjustment.params, list(counts), list(counts.values())))
        self._biased += [(row, token, amount) for token, amount in adjustment.params.logit_bias.items()]
        self._banned += [(row, token) for token in adjustment.banned]
        forced = adjustment.forced
        if forced is not None:
            self._forced.append((row, forced))

    def apply(self, logits: Tensor) -> None:
        """Change the logits in place."""
        if self._penalised:
            _penalise(logits, self._penalised)
        if self._biased:
            rows, ids, amounts = zip(*self._biased, strict=True)
            add_bias(logits, torch.tensor(rows), torch.tensor(ids), torch.tensor(amounts))
        if self._banned:
            rows, ids = zip(*self._banned, strict=True)
            ban(logits, torch.tensor(rows), torch.tensor(ids))
        for row, token in self._forced:
            logits[row] = LOWEST
            logits[row, token] = 0.0


def _penalise(logits: Tensor, rows: list[tuple[int, SamplingParams, list[int], list[int]]]) -> None:
    lengths = torch.tensor([len(ids) for _, _, ids, _ in rows])
    params = [params for _, params, _, _ in rows]
    penalise(
        logits,
        rows=torch.tensor([row for row, _, _, _ in rows]).repeat_interleave(lengths),
        token_ids=torch.tensor([token for _, _, ids, _ in rows for token in ids]),
        counts=torch.tensor([count for _, _, _, counts in rows for count in counts]),
        repetition=torch.tensor([p.repetition_penalty for p in params]).repeat_interleave(lengths),
        frequency=torch.tensor([p.frequency_penalty for p in params]).repeat_interleave(lengths),
        presence=torch.tensor([p.presence_penalty for p in params]).repeat_interleave(lengths),
    )


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
