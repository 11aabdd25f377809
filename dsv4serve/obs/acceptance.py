"""Whether drafts are accepted as often as they used to be.

A wrong scale or layout in the MTP block changes no answer, because a draft that is wrong is rejected: it only costs
speed, and one in the main model makes the two disagree. The accept rate shows both. Watched is the first draft of each
verify, because its rate does not depend on how many drafts there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

WINDOW = 100  # first drafts that are "now"
MIN_HISTORY = 300  # first drafts before them that make a history
MEMORY = 2000.0  # first drafts after which the history has forgotten two thirds: the alarm ends when it has followed
SHARE = 0.7  # the rate is low below this share of the reference,
DEVIATIONS = 4.0  # and if so many standard deviations below it


class Counts(NamedTuple):
    """Totals since the start, by place of the draft, and drafts whose logits had NaN or infinite values."""

    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    num_nonfinite: int


class AcceptanceWatch:
    """Compares the accept rate of the last WINDOW first drafts with a reference.

    Args:
        num_draft_tokens: places that drafts have.
        reference: accept rate of first drafts to hold it against, in (0, 1); 0 = the server's own history.
    """

    def __init__(self, num_draft_tokens: int, reference: float = 0.0) -> None:
        self._configured = reference
        self._samples = deque([Counts((0,) * num_draft_tokens, (0,) * num_draft_tokens, 0)])
        self._history, self._num_history = 0.0, 0.0
        self.is_low, self.num_alarms = False, 0

    def observe(self, drafted: Sequence[int], accepted: Sequence[int], num_nonfinite: int) -> str | None:
        """Take the totals after a step. A line for the log when the rate has fallen, or is as before again."""
        now = Counts(tuple(drafted), tuple(accepted), num_nonfinite)
        samples = self._samples
        samples.append(now)
        while now.drafted[0] - samples[1].drafted[0] >= WINDOW:
            old = samples.popleft()
            self._remember(samples[0].drafted[0] - old.drafted[0], samples[0].accepted[0] - old.accepted[0])
        num, reference = now.drafted[0] - samples[0].drafted[0], self._reference()
        if num < WINDOW or reference is None:
            return None
        rate = (now.accepted[0] - samples[0].accepted[0]) / num
        deviation = sqrt(reference * (1 - reference) / num)
        limit = min(SHARE * reference, reference - DEVIATIONS * deviation)
        was_low = self.is_low
        self.is_low = rate < ((limit + reference) / 2 if was_low else limit)  # half way back, or it would flicker
        if self.is_low == was_low:
            return None
        self.num_alarms += self.is_low
        return self._describe(samples[0], now, rate, reference)

    def _remember(self, num_drafts: int, num_accepted: int) -> None:
        if num_drafts:
            self._num_history += num_drafts
            weight = num_drafts / min(self._num_history, MEMORY)
            self._history += (num_accepted / num_drafts - self._history) * min(weight, 1.0)

    def _reference(self) -> float | None:
        if self._configured:
            return self._configured
        return self._history if self._num_history >= MIN_HISTORY else None

    def _describe(self, first: Counts, now: Counts, rate: float, reference: float) -> str:
        places = [
            f"{(accepted - before) / (drafted - earlier):.2f}"
            for drafted, earlier, accepted, before in zip(
                now.drafted, first.drafted, now.accepted, first.accepted, strict=True
            )
            if drafted > earlier
        ]
        source = "configured" if self._configured else f"of the {self._num_history:.0f} before"
        num_nonfinite = now.num_nonfinite - first.num_nonfinite
        facts = (
            f"{rate:.2f} of the last {now.drafted[0] - first.drafted[0]} first drafts, reference {reference:.2f} "
            f"({source}); by place {', '.join(places)}; drafts with NaN or infinite logits: {num_nonfinite}"
        )
        if not self.is_low:
            return f"drafts are accepted as before: {facts}"
        return (
            f"the accept rate of drafts fell: {facts}. Answers stay as exact as the main model is. Either the texts "
            "have changed, or the MTP block or the main model computes wrong numbers"
        )
