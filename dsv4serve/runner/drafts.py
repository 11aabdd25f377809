"""The drafts of one step, while they are made and until they are judged.

They stay tensors: `choose` hands the logits' tokens on to the next pass of the block, `inputs` to the main model, and
`read` reads all of them at the end. Only of a request whose penalties, bans or grammar have to know them each draft is
read as soon as it is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_kernels.sampling import DRAFT, LOWEST, distribution, sample, uniform
from dsv4serve.runner.adjust import adjust
from dsv4serve.runner.constraints import Constraints
from dsv4serve.runner.slots import SlotTable
from dsv4serve.types import SamplingParams


class Drafts:
    """counts[b] >= 1 drafts for each slot of `batch`: `choose` makes all first ones, then all second ones ..

    Sampled requests sample them, too, with the same settings as their tokens: rejection sampling keeps any proposal
    exact, and this one is accepted most often.
    """

    def __init__(self, slots: SlotTable, constraints: Constraints, batch: list[int], counts: list[int]) -> None:
        self.batch, self.counts = batch, counts
        self._slots, self._constraints = slots, constraints
        self.params = [slots.params(slot) for slot in batch]
        self.settings = settings_of(self.params)
        self.sampled = [place for place, params in enumerate(self.params) if params.temperature > 0]
        self.tokens = torch.full((len(batch), max(counts)), -1)  # int64, -1 where a slot has no such draft
        self._is_wrong = torch.zeros(len(batch), dtype=torch.int64)
        self._proposal: Tensor | None = None
        self._num_made = 0  # for each slot that has so many
        # Drafts by place, of requests whose logits depend on them; nobody knows the others' before the end.
        self._known: dict[int, list[int]] = {
            place: []
            for place, slot in enumerate(batch)
            if slots.adjustments[slot] is not None or constraints.has(slot)
        }

    @property
    def num_rows(self) -> int:
        """Rows that the drafts and the tokens before them take in a step."""
        return len(self.batch) + sum(self.counts)

    def choose(self, places: list[int], logits: Tensor) -> Tensor:
        """The next drafts int64 [n] of the slots at `places` of the batch, from float32 logits [n, vocab]."""
        # A broken MTP block must cost speed, not answers: any proposal is as exact as any other.
        is_wrong = ~torch.isfinite(logits)
        self._is_wrong.index_add_(0, torch.tensor(places), is_wrong.any(-1).long())
        logits = logits.masked_fill_(is_wrong, LOWEST)
        self._adjust(places, logits)
        rows = [row for row, place in enumerate(places) if self.params[place].temperature > 0]
        chosen = logits.max(-1).indices  # of equal ones the lowest
        if rows:
            some = [places[row] for row in rows]
            settings = {name: value[some] for name, value in self.settings.items()}
            draws = torch.tensor([self._number(place, self._num_made, DRAFT) for place in some], dtype=torch.float64)
            chosen[rows] = sample(logits[rows], **settings, uniform=draws)
            if self._proposal is None:
                self._proposal = torch.zeros(len(self.sampled), self.tokens.shape[1], logits.shape[1])
            self._proposal[[self.sampled.index(place) for place in some], self._num_made] = distribution(
                logits[rows], **settings
            )
        self._take(places, chosen)
        return chosen

    def _adjust(self, places: list[int], logits: Tensor) -> None:
        if self._known:
            batch = [self.batch[place] for place in places]
            adjust(logits, [self._slots.adjustments[slot] for slot in batch])
            self._constraints.apply(logits, batch)

    def _take(self, places: list[int], chosen: Tensor) -> None:
        if len(places) == len(self.batch):
            self.tokens[:, self._num_made] = chosen
        else:
            self.tokens[places, self._num_made] = chosen
        self._num_made += 1
        if self._known.keys() & set(places):
            for place, token in zip(places, chosen.tolist(), strict=True):
                if place in self._known:
                    slot, adjustment = self.batch[place], self._slots.adjustments[self.batch[place]]
                    self._known[place].append(token)
                    if adjustment is not None:
                        adjustment.append(token)
                    self._constraints.look_ahead(slot, token)

    def end(self) -> None:
        """All drafts are made: what they did to adjustments and constraints is taken back."""
        for place, tokens in self._known.items():
            slot = self.batch[place]
            adjustment = self._slots.adjustments[slot]
            if adjustment is not None:
                adjustment.undo(tokens)
            self._constraints.undo(slot, len(tokens))

    def inputs(self) -> Tensor:
        """int64 [num_rows]: of slot after slot the token that it drew last and its drafts."""
        last = torch.tensor([self._slots.last_token[slot] for slot in self.batch])
        rows = torch.cat([last.unsqueeze(1), self.tokens], dim=1)
        return rows.flatten() if min(self.counts) == max(self.counts) else rows.flatten()[self._flat()]

    def logit_rows(self) -> Tensor:
        """int64 [B, K + 1]: which of the `num_rows` rows is behind 0 to K drafts; beyond a slot's last one that is
        repeated."""
        counts = torch.tensor(self.counts).unsqueeze(1)
        first = (counts + 1).cumsum(0) - counts - 1
        return first + torch.minimum(torch.arange(self.tokens.shape[1] + 1), counts)

    def adjust_rows(self, logits: Tensor) -> None:
        """Change the main model's logits [num_rows, vocab] in place as the slots' requests ask."""
        if self._known:
            # What nobody reads is -1, which takes a row like any other draft.
            known = [self._known.get(place, [-1] * count) for place, count in enumerate(self.counts)]
            adjust(logits, [self._slots.adjustments[slot] for slot in self.batch], known)
            self._constraints.apply(logits, self.batch, known)

    def proposal(self) -> Tensor:
        """What the drafts of the S sampled slots were drawn from: float32 [S, K, vocab], 0 where there is no draft."""
        return torch.empty(0, self.tokens.shape[1], 0) if self._proposal is None else self._proposal

    def numbers(self, width: int, stream: int) -> Tensor:
        """Random numbers float64 [S, width] of the sampled slots' next outputs."""
        numbers = [[self._number(place, offset, stream) for offset in range(width)] for place in self.sampled]
        return torch.tensor(numbers, dtype=torch.float64).view(len(self.sampled), width)

    def read(self, num_accepted: Tensor, next_ids: Tensor) -> tuple[list[int], list[list[int]], int]:
        """How many drafts each slot keeps, its new tokens, and the number of drafts whose logits had NaN or infinite
        values, from int64 [B] each: the step's one read."""
        columns = [num_accepted.unsqueeze(1), next_ids.unsqueeze(1), self._is_wrong.unsqueeze(1), self.tokens]
        rows: list[list[int]] = torch.cat(columns, dim=1).tolist()
        return [row[0] for row in rows], [[*row[3 : 3 + row[0]], row[1]] for row in rows], sum(row[2] for row in rows)

    def _number(self, place: int, offset: int, stream: int) -> float:
        return uniform(self.params[place].seed, self._slots.num_outputs[self.batch[place]] + offset, stream)

    def _flat(self) -> list[int]:
        width = self.tokens.shape[1] + 1
        return [place * width + column for place, count in enumerate(self.counts) for column in range(count + 1)]


def settings_of(params: Sequence[SamplingParams]) -> dict[str, Tensor]:
    """Arguments of `sample` and `distribution`, [len(params)] each."""
    return {
        "temperature": torch.tensor([p.temperature for p in params]),
        "top_k": torch.tensor([p.top_k for p in params]),
        "top_p": torch.tensor([p.top_p for p in params]),
        "min_p": torch.tensor([p.min_p for p in params]),
    }
