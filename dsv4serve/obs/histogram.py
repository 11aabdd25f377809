"""A histogram for the step loop: an observation costs a bisection and two additions."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

# Seconds, from a scheduler step without a model to a prefill chunk of a large one on a CPU.
STEP_BOUNDS = (
    *(0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005),
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)


class StepHistogram(msgspec.Struct):
    """Seconds. counts[i]: durations up to STEP_BOUNDS[i] and above the bound before; the last one: the rest."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(STEP_BOUNDS) + 1))
    sum: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(STEP_BOUNDS, seconds)] += 1
        self.sum += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        """Pairs of upper bound and durations up to it, as Prometheus has them; the last bound is +Inf."""
        pairs, total = [], 0
        for bound, count in zip([*map(str, STEP_BOUNDS), "+Inf"], self.counts, strict=True):
            total += count
            pairs.append((bound, float(total)))
        return pairs
