"""How many drafts a step verifies per request: pure arithmetic on what was accepted and on how long steps took.

A draft costs a pass of the MTP block and a row of the main model. What that is worth depends on the machine and on the
batch (a row is nearly free where reading the weights dominates, and dear where computing does), so both are measured.
Numbers of drafts often differ by a few per cent, less than a machine's speed drifts within seconds. So their costs are
kept as ratios to the steps around them, and remembered for long; the machine's pace is one number, soon forgotten.

While a step runs, the host digests the one before it and plans the one behind it. Where that takes about as long as the
step, a single step of another number takes as long as its neighbours make it. So a step counts only behind one with the
same number, and a number is tried in several steps in a row.

What is known from few steps may be wrong by their noise. So numbers are compared by the least that each may cost: one
that seems dear is tried again as long as it could be the best, one that seems cheap is chosen, and seen.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from statistics import median

from dsv4serve.types import SamplingParams

MEMORY = 128.0  # judged drafts after which an observation has lost two thirds of its weight
PRIOR = 0.7  # accept rate of a draft, given that those before it were accepted, before anything was seen,
PRIOR_WEIGHT = 4.0  # and of how many drafts that counts as
TRIES = 5  # steps whose middle one shows how long a number of drafts takes at first: some take many times as long
FIRST_VARIANCE = 0.04  # of a step's time over what was expected, before any was seen
COST_MEMORY = 64.0  # steps after which the cost of a number of drafts has lost two thirds of its weight
PACE_MEMORY = 8.0  # the same of the machine's pace
LONGEST = 1.25  # of what was expected: a step that takes longer was interrupted, and counts as this
PROBE_STEPS = 96  # after so many steps another number than the best is tried, or its numbers would grow old,
PROBE_RUN = 3  # in so many steps, of which the first does not count,
PROBE_SHARE = 0.01  # but tries lose no more than this share of the time,
MOST_SPARE = 8.0  # which is saved up for so many steps of the usual length at most


class DraftPolicy:
    """Chooses the number of drafts for each step.

    Args:
        most: drafts that rings and states have room for, at least 1.
        adaptive: choose what gives the most tokens per second; else always `most`.
        may_draft: whether the runner makes drafts for a request with these parameters.
    """

    def __init__(
        self, most: int, adaptive: bool, may_draft: Callable[[SamplingParams], bool] = attrgetter("may_speculate")
    ) -> None:
        self.most, self._adaptive, self.may_draft = most, adaptive, may_draft
        self._rates = [PRIOR] * most  # of first, second, .. drafts, given that those before were accepted
        self._counts = [PRIOR_WEIGHT] * most
        self._costs: dict[int, _Costs] = {}  # by size class of the batch
        self._before: tuple[_Costs, int] | None = None  # class and drafts of the last step of decodes alone

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """A verify with `num_drafts` drafts of which the first `num_accepted` were accepted."""
        for position in range(min(num_drafts, num_accepted + 1)):
            self._counts[position] += 1
            weight = 1 / min(self._counts[position], MEMORY)
            self._rates[position] += ((position < num_accepted) - self._rates[position]) * weight

    def took(self, num_requests: int, num_drafts: int, seconds: float) -> None:
        """A step of nothing but `num_requests` decodes, with so many drafts each, ended `seconds` after the last one.

        So what the host does between two steps counts for those that are not submitted ahead. The first step of another
        number or class counts for nothing.
        """
        costs = self._class(num_requests)
        if self._before == (costs, num_drafts):
            costs.add(num_drafts, seconds)
        self._before = costs, num_drafts

    def choose(self, num_requests: int) -> int:
        """Drafts per request, 0 to `most`, of a step with so many decoding requests."""
        if not self._adaptive:
            return self.most
        costs = self._class(num_requests)
        for num in range(self.most, -1, -1):
            if len(costs.tries[num]) < TRIES:
                return num
        best, best_speed, tokens, chance = 0, 0.0, [1.0], 1.0
        for num, cost in enumerate(costs.least()):
            if tokens[num] / cost > best_speed:
                best, best_speed = num, tokens[num] / cost
            if num < self.most:
                chance *= self._rates[num]
                tokens.append(tokens[num] + chance)
        best_speed = tokens[best] / costs.ratios[best]
        losses = [cost - made / best_speed for cost, made in zip(costs.ratios, tokens, strict=True)]
        return costs.probe(best, losses)

    def _class(self, num_requests: int) -> _Costs:
        """Batches of 1, 2, 3 to 4, 5 to 8, .. requests take about as long."""
        return self._costs.setdefault((num_requests - 1).bit_length(), _Costs(self.most))


class _Costs:
    """What steps cost by the number of drafts: pace x ratio = seconds."""

    def __init__(self, most: int) -> None:
        self.tries: list[list[float]] = [[] for _ in range(most + 1)]  # seconds of the first steps
        self.counts = [0] * (most + 1)
        self.ratios = [1.0] * (most + 1)
        self._pace, self._variance = 0.0, FIRST_VARIANCE
        self._next, self._num_steps, self._spare = 0, 0, 0.0  # of tries; what they may still lose, in ratios
        self._num_left = 0  # steps of the present try

    def least(self) -> list[float]:
        """What each may cost at least: its ratio less its standard error."""
        return [
            ratio * (1 - (self._variance / min(count, COST_MEMORY)) ** 0.5)
            for ratio, count in zip(self.ratios, self.counts, strict=True)
        ]

    def probe(self, best: int, losses: list[float]) -> int:
        """The best number, or the one whose turn it is to be tried; `losses`: what a step of each loses, in ratios."""
        self._num_steps += 1
        self._spare = min(self._spare + PROBE_SHARE * self.ratios[best], MOST_SPARE)
        if self._num_left == 0:
            if self._next == best:
                self._next = (self._next + 1) % len(self.ratios)
            loss = PROBE_RUN * losses[self._next]
            if self._num_steps < PROBE_STEPS or loss > self._spare:
                return best
            self._num_steps, self._spare, self._num_left = 0, self._spare - loss, PROBE_RUN
        self._num_left -= 1
        tried = self._next
        if self._num_left == 0:
            self._next = (tried + 1) % len(self.ratios)
        return tried

    def add(self, num_drafts: int, seconds: float) -> None:
        self.counts[num_drafts] += 1
        tries = self.tries[num_drafts]
        if len(tries) < TRIES:
            tries.append(seconds)
            if len(tries) == TRIES:
                self._pace = self._pace or median(tries)
                self.ratios[num_drafts] = median(tries) / self._pace
            return
        seconds = min(seconds, LONGEST * self._pace * self.ratios[num_drafts])
        weight = 1 / min(self.counts[num_drafts], COST_MEMORY)
        self._variance += ((seconds / (self._pace * self.ratios[num_drafts]) - 1) ** 2 - self._variance) / COST_MEMORY
        self.ratios[num_drafts] += (seconds / self._pace - self.ratios[num_drafts]) * weight
        self._pace += (seconds / self.ratios[num_drafts] - self._pace) / PACE_MEMORY
