"""How many drafts a step verifies per request: pure arithmetic on what was accepted and on how long steps took.

A draft costs a pass of the MTP block and a row of the main model. What that is worth depends on the machine and on the
batch (a row is nearly free where reading the weights dominates, and dear where computing does), so both are measured.
Numbers of drafts often differ by a few per cent, and a machine may take twice as long for some tens of steps. So steps
are only compared with those next to them: what counts is how long steps took before and after the number changed.

A step ends when it has run, and when the host has digested the step before and planned the one behind. Where that takes
about as long as running, a step takes as long as its neighbours make it. So a step counts only between two of the same
number, and a number is tried in several steps in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from statistics import median

from dsv4serve.types import SamplingParams

MEMORY = 128.0  # judged drafts after which an observation has lost two thirds of its weight
PRIOR = 0.7  # accept rate of a draft, given that those before it were accepted, before anything was seen,
PRIOR_WEIGHT = 4.0  # and of how many drafts that counts as
ROUNDS = 5  # in which all numbers are tried one after the other at first; of what they say the middle counts
SAME_SIZE = 0.125  # requests more or less, as a share, with which a round goes on
TRY_STEPS = 4  # of a later try, of which the middle two count,
TRY_EVERY = 128  # steps after which what is known of a number is old,
TRY_SHARE = 0.003  # of the time at most is lost by tries of a number: where they would lose more, they are rarer
LEARNED = 0.5  # of the logarithm of what two comparisons say


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
        self._seconds: float | None = None  # that it took, if the one before it was of the same
        self._may_try = True

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """A verify with `num_drafts` drafts of which the first `num_accepted` were accepted."""
        for position in range(min(num_drafts, num_accepted + 1)):
            self._counts[position] += 1
            weight = 1 / min(self._counts[position], MEMORY)
            self._rates[position] += ((position < num_accepted) - self._rates[position]) * weight

    def took(self, num_requests: int, num_drafts: int, seconds: float, has_chunks: bool = False) -> None:
        """A step of `num_requests` decodes, with so many drafts each, ended `seconds` after the last one.

        So what the host does between two steps counts for those that are not submitted ahead. Steps with chunks say
        nothing of drafts, and while they come no number is tried.
        """
        self._may_try = not has_chunks
        if has_chunks:
            return
        costs = self._class(num_requests)
        is_same = self._before == (costs, num_drafts)
        if is_same and self._seconds is not None:
            costs.add(num_requests, num_drafts, self._seconds)
        self._before, self._seconds = (costs, num_drafts), seconds if is_same else None

    def choose(self, num_requests: int) -> int:
        """Drafts per request, 0 to `most`, of a step with so many decoding requests."""
        if not self._adaptive:
            return self.most
        tokens, chance = [1.0], 1.0
        for rate in self._rates:
            chance *= rate
            tokens.append(tokens[-1] + chance)
        return self._class(num_requests).choose(tokens, self._may_try)

    def _class(self, num_requests: int) -> _Costs:
        """Batches of 1, 2, 3 to 4, 5 to 8, .. requests take about as long."""
        return self._costs.setdefault((num_requests - 1).bit_length(), _Costs(self.most))


class _Costs:
    """What steps cost by the number of drafts, as ratios to each other."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._rounds: list[list[float]] = [[]]  # of first tries: seconds of a step with `most` drafts, .. with none
        self._size = 0  # requests in the present round
        self._ratios: list[float] = []  # when the rounds are over
        self._num_steps, self._tried_at = 0, [0] * (most + 1)
        self._trying, self._num_left = 0, 0  # number and steps of the present try
        # Of the present steps that count: their drafts, how many they were, seconds of the last two, and the first two
        # over what those before let expect.
        self._number, self._num_same, self._last, self._off = most, 0, (0.0, 0.0), 1.0
        self._other, self._expected = most, 0.0  # drafts before, and seconds by ratio as of the last two; 0: unknown

    def choose(self, tokens: list[float], may_try: bool) -> int:
        """The number that gives the most of `tokens` (by number) in a second, or the one whose turn it is to be tried.

        Until the first rounds are over that is `most`.
        """
        if not self._ratios:
            return self._most - len(self._rounds[-1]) if may_try else self._most
        speeds = [made / ratio for made, ratio in zip(tokens, self._ratios, strict=True)]
        best = speeds.index(max(speeds))
        if not may_try:
            return best
        self._num_steps += 1
        self._tried_at[best] = self._num_steps
        for num, speed in enumerate(speeds):
            lost = TRY_STEPS * (1 - speed / speeds[best]) * self._ratios[num] / self._ratios[best]
            if not self._num_left and self._num_steps - self._tried_at[num] >= max(TRY_EVERY, lost / TRY_SHARE):
                self._trying, self._num_left, self._tried_at[num] = num, TRY_STEPS, self._num_steps
        if not self._num_left:
            return best
        self._num_left -= 1
        return self._trying

    def add(self, num_requests: int, num_drafts: int, seconds: float) -> None:
        """A step that counts."""
        if not self._ratios:
            self._add_first(num_requests, num_drafts, seconds)
            return
        if num_drafts != self._number:
            self._expected = sum(self._last) / self._ratios[self._number] if self._num_same > 1 else 0.0
            self._other, self._number, self._num_same = self._number, num_drafts, 0
        self._last = self._last[1], seconds
        self._num_same += 1
        if self._num_same == 2:
            off = sum(self._last) / (self._expected * self._ratios[num_drafts]) if self._expected else 1.0
            # The steps before were compared with those before them and now with these. An interruption changes one.
            low, high = sorted((self._off, 1 / off))
            self._ratios[self._other] *= (low if low > 1 else high if high < 1 else 1.0) ** LEARNED
            self._off = off

    def _add_first(self, num_requests: int, num_drafts: int, seconds: float) -> None:
        times = self._rounds[-1]
        if abs(num_requests - self._size) > SAME_SIZE * self._size:
            times.clear()
        if not times:
            self._size = num_requests
        if num_drafts != self._most - len(times):
            return  # it was submitted before this number had its step
        times.append(seconds)
        if not num_drafts:
            if len(self._rounds) == ROUNDS:
                shares = [[each / sum(times) for each in reversed(times)] for times in self._rounds]
                self._ratios = [median(by_round) for by_round in zip(*shares, strict=True)]
            self._rounds.append([])
