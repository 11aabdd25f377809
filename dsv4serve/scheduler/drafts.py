"""How many drafts a step verifies per request. Pure arithmetic on what was accepted so far."""

from __future__ import annotations

# Costs in units of what a step costs whatever runs in it (weights are read once). Measured values belong here once the
# GPU path runs; both only decide how early speculation gives way to a large batch.
DRAFT_COST = 0.05  # one pass of the MTP block
ROW_COST = 0.01  # one more row in the main model
MEMORY = 64.0  # verifies after which an observation has lost two thirds of its weight
PRIOR = 0.7  # accept rate of a draft, given that those before it were accepted, before anything was seen
PROBE_STEPS = 64  # every so many steps all drafts are made, or the rates of those left out would never be seen again


class DraftPolicy:
    """Chooses the number of drafts for each step.

    Args:
        most: drafts that rings and states have room for, at least 1.
        adaptive: choose by what was accepted and by the batch; else always `most`.
    """

    def __init__(self, most: int, adaptive: bool) -> None:
        self.most, self._adaptive = most, adaptive
        self._rates = [PRIOR ** (position + 1) for position in range(most)]
        self._num_steps = 0

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """A verify with `num_drafts` drafts of which the first `num_accepted` were accepted."""
        for position in range(num_drafts):
            self._rates[position] += ((position < num_accepted) - self._rates[position]) / MEMORY

    def choose(self, num_requests: int) -> int:
        """Drafts per request, 0 to `most`, of a step with so many decoding requests: those that give the most tokens
        for the time that the step takes."""
        if not self._adaptive:
            return self.most
        self._num_steps += 1
        if self._num_steps % PROBE_STEPS == 0:
            return self.most
        best, best_speed, tokens = 0, 0.0, 1.0
        for num in range(self.most + 1):
            speed = tokens / (1.0 + num * DRAFT_COST + (1 + num) * num_requests * ROW_COST)
            if speed > best_speed:
                best, best_speed = num, speed
            if num < self.most:
                tokens += self._rates[num]
        return best
