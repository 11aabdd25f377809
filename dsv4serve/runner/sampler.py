"""From logits to tokens: one for a row, or the accepted drafts and one more for the rows of a verify."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_kernels.sampling import COIN, DRAFT, LOWEST, distribution, sample, uniform
from dsv4serve.runner import logprobs
from dsv4serve.runner.adjust import adjust
from dsv4serve.runner.constraints import Constraints
from dsv4serve.runner.slots import SlotTable
from dsv4serve.speculative import judge, pad_drafts
from dsv4serve.types import SamplingParams, StepOutput


class Sampler:
    """Draws tokens and tells the slots, their adjustments and constraints of them."""

    def __init__(self, slots: SlotTable, constraints: Constraints) -> None:
        self._slots, self._constraints = slots, constraints

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
        token_ids = sample(logits, **_settings(params), uniform=torch.tensor(numbers, dtype=torch.float64)).tolist()
        for place, (slot, token) in enumerate(zip(batch, token_ids, strict=True)):
            self.take(slot, [token], result)
            raw.report(place, slot, [token], result)

    def start_drafts(self, batch: list[int]) -> Drafts:
        """Drafts for the slots of `batch`, to be made."""
        return Drafts(self._slots, self._constraints, batch)

    def verify(self, logits: Tensor, drafts: Drafts, result: StepOutput) -> list[int]:
        """New tokens for the slots that have drafts, and how many drafts each of them keeps.

        `logits` float32, changed in place: behind 0, 1, .. drafts, slot after slot.
        """
        slots, batch, token_ids = self._slots, drafts.batch, drafts.token_ids
        params = [slots.params(slot) for slot in batch]
        raw = _Raw(logits, params, [1 + len(each) for each in token_ids])
        adjust(logits, [slots.adjustments[slot] for slot in batch], token_ids)
        self._constraints.apply(logits, batch, token_ids)
        padded, rows = pad_drafts(token_ids)
        accepted, next_ids = judge(
            logits,
            rows,
            padded,
            drafts.proposal(logits.shape[1]),
            settings=_settings(params),
            coins=drafts.numbers(padded.shape[1], COIN),
            draws=drafts.numbers(padded.shape[1] + 1, 0),
        )
        result.num_nonfinite_drafts = drafts.num_nonfinite
        num_accepted: list[int] = accepted.tolist()
        for place, (slot, count, token) in enumerate(zip(batch, num_accepted, next_ids.tolist(), strict=True)):
            tokens = [*token_ids[place][:count], token]
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


class Drafts:
    """The drafts of a step, while they are made: `choose` takes the logits of the first ones, then the second ones ..

    Sampled requests sample them, too, with the same settings as their tokens: rejection sampling keeps any proposal
    exact, and this one is accepted most often.
    """

    def __init__(self, slots: SlotTable, constraints: Constraints, batch: list[int]) -> None:
        self._slots, self._constraints, self.batch = slots, constraints, batch
        self._params = [slots.params(slot) for slot in batch]
        self._sampled = [place for place, params in enumerate(self._params) if params.temperature > 0]
        self._proposals: list[tuple[list[int], Tensor]] = []  # places in _sampled, probabilities
        self.token_ids: list[list[int]] = [[] for _ in batch]
        self.num_nonfinite = 0  # rows of logits with NaN or infinite values

    @property
    def num_rows(self) -> int:
        """Rows that the drafts and the tokens before them take in a step."""
        return sum(1 + len(each) for each in self.token_ids)

    def choose(self, places: list[int], logits: Tensor) -> Tensor:
        """The next drafts int64 [n] of the slots at `places` of the batch, from float32 logits [n, vocab]."""
        # A broken MTP block must cost speed, not answers: any proposal is as exact as any other.
        is_wrong = ~torch.isfinite(logits)
        if bool(is_wrong.any()):
            self.num_nonfinite += int(is_wrong.any(-1).sum())
            logits = logits.masked_fill(is_wrong, LOWEST)
        slots, batch = self._slots, [self.batch[place] for place in places]
        adjust(logits, [slots.adjustments[slot] for slot in batch])
        self._constraints.apply(logits, batch)
        params = [self._params[place] for place in places]
        settings = _settings(params)
        numbers = [
            uniform(p.seed, slots.num_outputs[slot] + len(self.token_ids[place]), DRAFT)
            for p, slot, place in zip(params, batch, places, strict=True)
        ]
        chosen = sample(logits, **settings, uniform=torch.tensor(numbers, dtype=torch.float64))
        rows = [row for row, p in enumerate(params) if p.temperature > 0]
        if rows:
            probs = distribution(logits[rows], **{name: value[rows] for name, value in settings.items()})
            self._proposals.append(([self._sampled.index(places[row]) for row in rows], probs))
        self._add(places, chosen.tolist())
        return chosen

    def _add(self, places: list[int], tokens: list[int]) -> None:
        for place, token in zip(places, tokens, strict=True):
            slot = self.batch[place]
            self.token_ids[place].append(token)
            adjustment = self._slots.adjustments[slot]
            if adjustment is not None:
                adjustment.append(token)
            self._constraints.look_ahead(slot, token)

    def end(self) -> None:
        """All drafts are made: what they did to adjustments and constraints is taken back."""
        for slot, tokens in zip(self.batch, self.token_ids, strict=True):
            adjustment = self._slots.adjustments[slot]
            if adjustment is not None:
                adjustment.undo(tokens)
            self._constraints.undo(slot, len(tokens))

    def proposal(self, vocab_size: int) -> Tensor:
        """What the drafts of the sampled slots were drawn from: float32 [S, K, vocab], 0 where there is no draft."""
        longest = max(map(len, self.token_ids))
        proposal = torch.zeros(len(self._sampled), longest, vocab_size)
        # Who has a second draft has a first one, so an entry's number is the place of its drafts.
        for place, (rows, probs) in enumerate(self._proposals):
            proposal[rows, place] = probs
        return proposal

    def numbers(self, width: int, stream: int) -> Tensor:
        """Random numbers float64 [S, width] of the sampled slots' next outputs."""
        numbers = [
            uniform(self._params[place].seed, self._slots.num_outputs[self.batch[place]] + offset, stream)
            for place in self._sampled
            for offset in range(width)
        ]
        return torch.tensor(numbers, dtype=torch.float64).view(len(self._sampled), width)


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


def _settings(params: list[SamplingParams]) -> dict[str, Tensor]:
    """Arguments of `sample` and `distribution`, [len(params)] each."""
    return {
        "temperature": torch.tensor([p.temperature for p in params]),
        "top_k": torch.tensor([p.top_k for p in params]),
        "top_p": torch.tensor([p.top_p for p in params]),
        "min_p": torch.tensor([p.min_p for p in params]),
    }


def row_bytes(logits: Tensor) -> list[bytes]:
    """float32 rows as bytes."""
    return [row.tobytes() for row in logits.float().numpy()]
