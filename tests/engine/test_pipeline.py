"""Steps submitted ahead of their results."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from support.bench import Bench
from support.fake_runner import FakeRunner, prompt

from dsv4serve.engine.pipeline import Pipeline
from dsv4serve.types import SchedulerOutput, StepOutput


class AheadRunner:
    """A fake runner whose results are taken one step late, as those of a GPU are."""

    steps_ahead = 1

    def __init__(self, runner: FakeRunner) -> None:
        self._runner = runner

    def submit(self, planned: SchedulerOutput) -> Callable[[], StepOutput]:
        result = self._runner.execute(planned)
        return lambda: result


def steps_of(bench: Bench, num_steps: int) -> list[SchedulerOutput]:
    """What was planned while four requests come one after the other and decode."""
    pipeline = Pipeline(bench.scheduler, AheadRunner(bench.runner))
    planned = []
    for number in range(num_steps):
        if number < 4:
            bench.add(f"r{number}", prompt(number, 20), max_tokens=200)
        finished = pipeline.step()
        if finished is not None:
            planned.append(finished.planned)
            bench.scheduler.update(finished.planned, finished.result)
    return planned


def test_requests_with_drafts_do_not_take_turns() -> None:
    bench = Bench(num_draft_tokens=2)
    planned = steps_of(bench, 40)
    assert [len(step.verifies) for step in planned[-10:]] == [4] * 10


def test_a_step_is_planned_behind_drafts_that_nobody_has_seen() -> None:
    """Also where a page ends, with fewer drafts there; but not where one of them may be the last token."""
    bench = Bench(num_slots=1, num_draft_tokens=2)
    bench.runner.accepts = 0
    pipeline = Pipeline(bench.scheduler, AheadRunner(bench.runner))
    bench.add("r", prompt(0, 230), max_tokens=40)
    depths = []
    while pipeline.has_work:
        finished = pipeline.step()
        depths.append(len(pipeline._submitted))
        if finished is not None:
            bench.scheduler.update(finished.planned, finished.result)
    assert set(depths[:-5]) == {1}
    assert depths[-5:].count(0) == 3
    assert len(bench.runner.slots[0].consumed) == 230 + 39


def test_what_a_step_cost_includes_what_the_host_did_since_the_last_one(monkeypatch) -> None:
    now, took = 0.0, []

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    bench = Bench(num_draft_tokens=2)
    monkeypatch.setattr(bench.scheduler, "took", lambda planned, seconds: took.append((now, seconds)))
    pipeline = Pipeline(bench.scheduler, AheadRunner(bench.runner), clock)
    bench.add("r", prompt(0, 20), max_tokens=50)
    for _ in range(12):
        finished = pipeline.step()
        if finished is not None:
            bench.scheduler.update(finished.planned, finished.result)
    ends = [end for end, _ in took]
    assert [seconds for _, seconds in took[1:]] == [end - before for before, end in itertools.pairwise(ends)]
