"""How many drafts a step verifies per request: pure arithmetic on what was accepted and on how long steps took.

A draft costs a pass of the MTP block and a row of the main model. What that is worth depends on the machine and on the
batch (a row is nearly free where reading the weights dominates, and dear where computing does), so both are measured.
"""

from __future__ import annotations

MEMORY = 32.0  # verifies after which an observation has lost two thirds of its weight
PRIOR = 0.7  # accept rate of a draft, given that those before it were accepted, before anything was seen
TRIES = 3  # steps that show how long a number of drafts takes
TIME_MEMORY = 8.0  # steps after which a time has lost two thirds of its weight
PROBE_STEPS = 32  # every so many steps another number than the best is tried, or its numbers would grow old


class DraftPolicy:
    """Chooses the number of drafts for each step.

    Args:
        most: drafts that rings and states have room for, at least 1.
        adaptive: choose what gives the most tokens per second; else always `most`.
    """

    def __init__(self, most: int, adaptive: bool) -> None:
        self.most, self._adaptive = most, adaptive
        self._rates = [PRIOR ** (position + 1) for position in range(most)]  # of accepted first, second, .. drafts
        self._times: dict[int, _Times] = {}  # by size class of the batch
        self._num_steps = 0

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """A verify with `num_drafts` drafts of which the first `num_accepted` were accepted."""
        for position in range(num_drafts):
            self._rates[position] += ((position < num_accepted) - self._rates[position]) / MEMORY

    def took(self, num_requests: int, num_drafts: int, seconds: float) -> None:
        """A step of nothing but `num_requests` decodes, with so many drafts each, took `seconds`."""
        self._class(num_requests).add(num_drafts, seconds)

    def choose(self, num_requests: int) -> int:
        """Drafts per request, 0 to `most`, of a step with so many decoding requests."""
        if not self._adaptive:
            return self.most
        times = self._class(num_requests)
        for num in range(self.most, -1, -1):
            if times.counts[num] < TRIES:
                return num
        self._num_steps += 1
        if self._num_steps % PROBE_STEPS == 0:
            return self._num_steps // PROBE_STEPS % (self.most + 1)
        best, best_speed, tokens = 0, 0.0, 1.0
        for num, seconds in enumerate(times.seconds):
            if tokens / seconds > best_speed:
                best, best_speed = num, tokens / seconds
            if num < self.most:
                tokens += self._rates[num]
        return best

    def _class(self, num_requests: int) -> _Times:
        """Batches of 1, 2, 3 to 4, 5 to 8, .. requests take about as long."""
        return self._times.setdefault((num_requests - 1).bit_length(), _Times(self.most))


class _Times:
    """How long steps take, by the number of drafts."""

    def __init__(self, most: int) -> None:
        self.counts = [0] * (most + 1)
        self.seconds = [0.0] * (most + 1)

    def add(self, num_drafts: int, seconds: float) -> None:
        self.counts[num_drafts] += 1
        weight = 1 / min(self.counts[num_drafts], TIME_MEMORY)
        self.seconds[num_drafts] += (seconds - self.seconds[num_drafts]) * weight
