"""The alarm of the accept rate: what sets it off, what does not, what it says."""

from __future__ import annotations

import random
import re

import pytest

from dsv4serve.obs.acceptance import MIN_HISTORY, WINDOW, AcceptanceWatch


class Drafts:
    """Verifies with two drafts each, whose accept rates a test sets."""

    def __init__(self, seed: int, reference: float = 0.0) -> None:
        self.watch, self._draw = AcceptanceWatch(2, reference), random.Random(seed)
        self._drafted, self._accepted, self.num_nonfinite = [0, 0], [0, 0], 0
        self.lines: list[str] = []

    def run(self, num_steps: int, rate: float, batch: int = 1) -> int | None:
        """The step after which the alarm began or ended, if it did."""
        changed = None
        for step in range(num_steps):
            for _ in range(batch):
                first = self._draw.random() < rate
                second = first and self._draw.random() < rate
                self._drafted = [count + 1 for count in self._drafted]
                self._accepted = [self._accepted[0] + first, self._accepted[1] + second]
            line = self.watch.observe(self._drafted, self._accepted, self.num_nonfinite)
            if line is not None:
                self.lines.append(line)
                changed = changed or step + 1
        return changed


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("before", "after"), [(0.9, 0.4), (0.7, 0.2), (0.4, 0.02)])
def test_a_fall_is_reported_once_and_so_is_the_return(seed: int, before: float, after: float) -> None:
    drafts = Drafts(seed)
    assert drafts.run(2000, before) is None
    began = drafts.run(200, after)
    assert began is not None
    assert drafts.watch.is_low
    assert drafts.run(150, before) is not None
    assert (drafts.watch.is_low, drafts.watch.num_alarms, len(drafts.lines)) == (False, 1, 2)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_steady_rate_is_no_alarm(rate: float) -> None:
    assert [Drafts(seed).run(8000, rate) for seed in range(4)] == [None] * 4


def test_without_a_history_there_is_nothing_to_compare_with() -> None:
    drafts = Drafts(0)
    assert drafts.run(MIN_HISTORY // 2, 0.9) is None
    assert drafts.run(WINDOW, 0.0) is None


def test_a_configured_reference_needs_no_history() -> None:
    drafts = Drafts(0, reference=0.8)
    assert drafts.run(WINDOW, 0.1) == WINDOW
    assert "reference 0.80 (configured)" in drafts.lines[0]


def test_the_history_follows_other_texts() -> None:
    drafts = Drafts(0)
    drafts.run(3000, 0.8)
    assert drafts.run(200, 0.3) is not None
    assert drafts.run(6000, 0.3) is not None
    assert not drafts.watch.is_low


def test_the_line_names_what_is_known() -> None:
    drafts = Drafts(1)
    drafts.run(1000, 0.8)
    drafts.num_nonfinite = 7
    drafts.run(200, 0.0)
    line = drafts.lines[0]
    assert re.search(r"0\.\d\d of the last 100 first drafts, reference 0\.\d\d \(of the \d+ before\); by place 0", line)
    assert "drafts with NaN or infinite logits: 7" in line


def test_steps_with_many_requests_count_every_one() -> None:
    drafts = Drafts(2)
    assert drafts.run(50, 0.8, batch=256) is None
    assert drafts.run(1, 0.1, batch=256) == 1
