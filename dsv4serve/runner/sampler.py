"""From logits to tokens: one for a row, or the accepted drafts and one more for the rows of a verify."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_kernels.sampling import COIN, sample, uniform
from dsv4serve.runner import logprobs
from dsv4serve.runner.adjust import adjust
from dsv4serve.runner.constraints import Constraints
from dsv4serve.runner.drafts import Drafts, settings_of
from dsv4serve.runner.slots import SlotTable
from dsv4serve.speculative import judge
from dsv4serve.types import SamplingParams, StepOutput


class Sampler:
    """Draws tokens and tells the slots, their adjustments and constraints of them."""

    def __init__(self, slots: SlotTable, constraints: Constraints) -> None:
        self._slots, self._constraints = slots, constraints
        self.judge = judge  # a benchmark puts another one here, to accept as often as it wants to

    def draw(self, logits: Tensor, batch: list[int], result: StepOutput) -> None:
        """One token for each slot of `batch`: float32 [len(batch), vocab], changed in place."""
        if not batch:
            return
        slots = self._slots
        params = [slots.params(slot) for slot in batch]
        raw = _Raw(logits, params, [1] * len(batch))
        adjust(logits, [slots.adjustments[slot] for slot in batch])
        self._constraints.apply(logits, batch)
        numbers = [uniform(p.seed, slots.num_outputs[slot]) for p, slot in zip(params, batch, strict=True)]
        token_ids = sample(logits, **settings_of(params), uniform=torch.tensor(numbers, dtype=torch.float64)).tolist()
        for place, (slot, token) in enumerate(zip(batch, token_ids, strict=True)):
            self.take(slot, [token], result)
            raw.report(place, slot, [token], result)

    def start_drafts(self, batch: list[int], counts: list[int]) -> Drafts:
        """counts[b] >= 1 drafts for each slot of `batch`, to be made."""
        return Drafts(self._slots, self._constraints, batch, counts)

    def verify(self, logits: Tensor, drafts: Drafts, result: StepOutput) -> list[int]:
        """New tokens for the slots that have drafts, and how many drafts each of them keeps.

        `logits` float32, changed in place: behind 0, 1, .. drafts, slot after slot.
        """
        raw = _Raw(logits, drafts.params, [1 + count for count in drafts.counts])
        drafts.adjust_rows(logits)
        longest = drafts.tokens.shape[1]
        accepted, next_ids = self.judge(
            logits,
            drafts.logit_rows(),
            drafts.tokens,
            drafts.proposal(),
            sampled=drafts.sampled,
            settings=drafts.settings,
            coins=drafts.numbers(longest, COIN),
            draws=drafts.numbers(longest + 1, 0),
        )
        num_accepted, new_tokens, result.num_nonfinite_drafts = drafts.read(accepted, next_ids)
        for place, (slot, tokens) in enumerate(zip(drafts.batch, new_tokens, strict=True)):
            self.take(slot, tokens, result)
            raw.report(place, slot, tokens, result)
        return num_accepted

    def take(self, slot: int, tokens: list[int], result: StepOutput) -> None:
        """Tell everybody of the new tokens of a slot's request."""
        for token in tokens:
            self._slots.sampled(slot, token)
            if (wrong := self._constraints.accept(slot, token)) is not None:
                result.errors[slot] = wrong
        result.slots.append(slot)
        result.token_ids.append(tokens)


class _Raw:
    """Copies of the rows that are asked for, as the model gave them: of the batch's b-th request counts[b] rows."""

    def __init__(self, logits: Tensor, params: list[SamplingParams], counts: Sequence[int]) -> None:
        self._params = params
        self._rows: dict[int, Tensor] = {}
        row = 0
        for place, (p, count) in enumerate(zip(params, counts, strict=True)):
            if p.return_logits or p.num_logprobs is not None:
                self._rows[place] = logits[row : row + count].clone()
            row += count

    def report(self, place: int, slot: int, tokens: list[int], result: StepOutput) -> None:
        """Put what the request wants to know of its new tokens into `result`."""
        rows = self._rows.get(place)
        if rows is None:
            return
        rows, params = rows[: len(tokens)], self._params[place]
        if params.return_logits:
            result.logits[slot] = row_bytes(rows)
        if params.num_logprobs is not None:
            result.logprobs[slot] = logprobs.describe(rows, tokens, params.num_logprobs)


def row_bytes(logits: Tensor) -> list[bytes]:
    """float32 rows as bytes."""
    return [row.tobytes() for row in logits.float().numpy()]
