"""How many drafts a step verifies per request: pure arithmetic on what was accepted and on how long steps took.

A draft costs a pass of the MTP block and a row of the main model. What that is worth depends on the machine and on the
batch (a row is nearly free where reading the weights dominates, and dear where computing does), so both are measured.
Numbers of drafts often differ by a few per cent, and a machine may take twice as long for some tens of steps. So a step
is only compared with the last one before it of another number and the same company: as many prompt tokens in it, about,
and prompt tokens in the step ahead of it or none. On a busy server hardly a step is without; what prompts add is the
same for all numbers of drafts, so differences of such steps tell as much, if what prompts add does not vary too much.

A step ends when it has run, and when the host has digested the step before and planned the one behind. Where that takes
about as long as running, a step takes as long as its neighbours make it. So a step counts only between two of the same
number, and a number is tried in several steps in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import exp, log
from operator import attrgetter
from statistics import median

from dsv4serve.types import SamplingParams

MEMORY = 128.0  # judged drafts after which an observation has lost two thirds of its weight
PRIOR = 0.7  # accept rate of a draft, given that those before it were accepted, before anything was seen,
PRIOR_WEIGHT = 4.0  # and of how many drafts that counts as
TRY_STEPS = 4  # of a try, of which the middle two count
ROUNDS = 5  # in which all numbers are tried one after the other at first; twice as many if most steps have prompts
LEAST = 3  # steps of each number that a round's end needs
TRY_EVERY = 128  # steps after which what is known of a number is old,
TRY_SHARE = 0.003  # of the time at most is lost by tries of a number: where they would lose more, they are rarer
NEAR = 32  # steps between two that are compared, at most
LEARNED = 0.5  # of the logarithm of what two comparisons say,
SCATTER = 0.15  # if steps in this company differ by no more than this share of a step of decodes alone; else less
SINGLE = 0.3  # the share of that where they are of one step
PACE = 0.2  # weight of a step in how fast the machine is now
LONGEST = 4.0  # times the last steps: what is longer was interrupted, or there was nothing to do

Company = tuple[int, bool]  # bits of the number of prompt tokens in a step; whether the step before it had any
Step = tuple[tuple[int, Company], int, float]  # round and company, drafts, seconds or a function of them


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
        self._last = (-1, False)  # drafts of the last step, and whether it had prompt tokens
        self._count_last: Callable[[], None] | None = None  # if the next step has as many drafts

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """A verify with `num_drafts` drafts of which the first `num_accepted` were accepted."""
        for position in range(min(num_drafts, num_accepted + 1)):
            self._counts[position] += 1
            weight = 1 / min(self._counts[position], MEMORY)
            self._rates[position] += ((position < num_accepted) - self._rates[position]) * weight

    def took(self, num_requests: int, num_drafts: int, seconds: float, num_prompt_tokens: int = 0) -> None:
        """A step of `num_requests` decodes, with so many drafts each, and of chunks of prompts, ended `seconds` after
        the last one. So what the host does between two steps counts for those that are not submitted ahead."""
        last_drafts, had_prompts = self._last
        if self._count_last is not None and num_drafts == last_drafts:
            self._count_last()
        self._count_last = None
        if num_requests:
            self._class(num_requests).took(num_drafts)
        if num_requests and num_drafts == last_drafts:
            company = num_prompt_tokens.bit_length(), had_prompts
            self._count_last = partial(self._class(num_requests).add, company, num_drafts, max(seconds, 1e-9))
        self._last = num_drafts, num_prompt_tokens > 0

    def choose(self, num_requests: int) -> int:
        """Drafts per request, 0 to `most`, of a step with so many decoding requests."""
        if not self._adaptive:
            return self.most
        tokens, chance = [1.0], 1.0
        for rate in self._rates:
            chance *= rate
            tokens.append(tokens[-1] + chance)
        return self._class(num_requests).choose(tokens)

    def _class(self, num_requests: int) -> _Costs:
        """Batches of 1, 2, 3 to 4, 5 to 8, .. requests take about as long."""
        return self._costs.setdefault((num_requests - 1).bit_length(), _Costs(self.most))


class _Firsts:
    """The first tries, of all numbers in turn, and what they come to."""

    def __init__(self, most: int) -> None:
        self._most, self._num_steps = most, 0
        self._found: list[Step] = []

    @property
    def _round(self) -> int:
        return self._num_steps // (TRY_STEPS * (self._most + 1))

    @property
    def number(self) -> int:
        """Whose turn it is. It stays until so many steps had it: where none can have drafts nothing is tried."""
        return self._most - self._num_steps // TRY_STEPS % (self._most + 1)

    def took(self, num_drafts: int) -> list[float]:
        """A step; returns `costs` where a round ends with it."""
        before = self._round
        self._num_steps += num_drafts == self.number
        return self.costs() if self._round > before else []

    def add(self, company: Company, num_drafts: int, seconds: float) -> None:
        """A step that counts."""
        if num_drafts == self.number:
            self._found.append(((self._round, company), num_drafts, seconds))

    def costs(self) -> list[float]:
        """Seconds of a step of decodes alone by drafts; empty as long as too little is known."""
        # A slow time makes all numbers longer by a factor, prompts make them longer by as much.
        alone = [(place, num, log(seconds)) for place, num, seconds in self._found if not place[1][0]]
        if self._round >= ROUNDS and self._is_enough(alone):
            return [exp(value) for value in self._fit(alone)]
        if self._round >= 2 * ROUNDS and self._is_enough(self._found):
            return [max(value, 1e-9) for value in self._fit(self._found)]
        return []

    def _is_enough(self, steps: list[Step]) -> bool:
        return all(len(values) >= LEAST for values in self._by_number(steps))

    def _by_number(self, steps: list[Step]) -> list[list[float]]:
        return [[value for _, num, value in steps if num == number] for number in range(self._most + 1)]

    def _fit(self, steps: list[Step]) -> list[float]:
        """A step takes what its round and company take, and what its number takes more: by medians in turn (Tukey's
        median polish), so that single steps do not count."""
        base, more = {place: 0.0 for place, _, _ in steps}, [0.0] * (self._most + 1)
        for _ in range(2 * ROUNDS):
            for place in base:
                base[place] = median(value - more[num] for other, num, value in steps if other == place)
            more = [median(values) for values in self._by_number([(p, n, value - base[p]) for p, n, value in steps])]
        fewest = min(company for _, company in base)
        shared = median(value for (_, company), value in base.items() if company == fewest)
        return [shared + each for each in more]


class _Run:
    """The last steps in some company that had one number of drafts."""

    def __init__(self, num_drafts: int, seconds: float, at: int, scatter: float | None, off: float | None) -> None:
        self.num_drafts, self.last, self.at = num_drafts, seconds, at  # `last`: of the last step
        self.is_single = True
        self.scatter = scatter  # mean difference of two steps of one number; None: not known
        self.off = off  # seconds by which it is longer than the run before lets expect, at pace 1; None: nothing before


class _Costs:
    """What steps of a size class cost by the number of drafts."""

    def __init__(self, most: int) -> None:
        self._firsts = _Firsts(most)
        self._seconds: list[float] = []  # of a step of decodes alone by drafts, at pace 1; empty until the rounds end
        self._pace = 1.0  # how much longer such steps take now
        self._num_steps, self._tried_at = 0, [0] * (most + 1)
        self._trying, self._num_left = 0, 0  # number and steps of the present try
        self._runs: dict[Company, _Run] = {}

    def took(self, num_drafts: int) -> None:
        """A step with so many drafts, whether it counts or not."""
        self._seconds = self._seconds or self._firsts.took(num_drafts)

    def choose(self, tokens: list[float]) -> int:
        """The number that gives the most of `tokens` (by number) in a second, or the one whose turn it is to be
        tried. Prompts cost a token the same whatever is drafted, so what they add to some steps does not change which
        is best. If no step is without, they count as a part of it: costs are then those of whole steps."""
        if not self._seconds:
            return self._firsts.number
        speeds = [made / seconds for made, seconds in zip(tokens, self._seconds, strict=True)]
        best = speeds.index(max(speeds))
        self._num_steps += 1
        self._tried_at[best] = self._num_steps
        for num, speed in enumerate(speeds):
            lost = TRY_STEPS * (1 - speed / speeds[best]) * self._seconds[num] / self._seconds[best]
            if not self._num_left and self._num_steps - self._tried_at[num] >= max(TRY_EVERY, lost / TRY_SHARE):
                self._trying, self._num_left, self._tried_at[num] = num, TRY_STEPS, self._num_steps
        if not self._num_left:
            return best
        self._num_left -= 1
        return self._trying

    def add(self, company: Company, num_drafts: int, seconds: float) -> None:
        """A step that counts."""
        if not self._seconds:
            self._firsts.add(company, num_drafts, seconds)
            return
        if not company[0]:
            self._pace += (min(seconds / self._seconds[num_drafts], LONGEST * self._pace) - self._pace) * PACE
        run = self._runs.get(company)
        if run is not None:
            seconds = min(seconds, LONGEST * run.last)
        if run is None or self._num_steps - run.at > NEAR:
            scatter = None if run is None else run.scatter
            self._runs[company] = _Run(num_drafts, seconds, self._num_steps, scatter, None)
        elif run.num_drafts == num_drafts:
            apart = abs(seconds - run.last)
            run.scatter = apart if run.scatter is None else run.scatter + (apart - run.scatter) * PACE / 2
            run.last, run.at, run.is_single = seconds, self._num_steps, False
        else:
            self._runs[company] = self._compare(company, run, num_drafts, seconds)

    def _compare(self, company: Company, run: _Run, num_drafts: int, seconds: float) -> _Run:
        """A step of another number than those before it in its company, which also says something of theirs."""
        expected = self._seconds[run.num_drafts]
        pace = run.last / expected if company == (0, False) else self._pace
        off = (seconds - run.last) / pace - (self._seconds[num_drafts] - expected)
        if run.off is not None and run.scatter is not None:
            # The first step of the run was compared with what was before it, and now its last one with what is behind.
            # An interruption changes one of the two, but of a single step both.
            low, high = sorted((run.off, -off))
            weight = (SCATTER / max(SCATTER, run.scatter / (expected * self._pace))) ** 2
            weight *= SINGLE if run.is_single else 1.0
            factor = 1 + (low if low > 0 else high if high < 0 else 0.0) / expected
            self._seconds[run.num_drafts] *= max(0.1, factor) ** (LEARNED * weight)
        return _Run(num_drafts, seconds, self._num_steps, run.scatter, off)
