"""Scheduler and runner, step after step: plans and submits, and takes results as late as the runner allows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from dsv4serve.engine.runner_protocol import Runner
from dsv4serve.scheduler import Scheduler
from dsv4serve.types import SchedulerOutput, StepOutput


@dataclass(frozen=True)
class FinishedStep:
    """A step whose result is to be given to the scheduler."""

    planned: SchedulerOutput
    result: StepOutput
    schedule_s: float  # for the plan
    seconds: float  # from when it was submitted, or the step before it finished, whichever is later


class Pipeline:
    """Keeps at most `runner.steps_ahead` steps submitted behind the one whose result is awaited."""

    def __init__(self, scheduler: Scheduler, runner: Runner, clock: Callable[[], float] = perf_counter) -> None:
        self._scheduler, self._runner, self._clock = scheduler, runner, clock
        # Plan, its time, when it was submitted, what gives the result.
        self._submitted: deque[tuple[SchedulerOutput, float, float, Callable[[], StepOutput]]] = deque()
        self._finished_at = float("-inf")

    @property
    def has_work(self) -> bool:
        """A request is open, or a step is not finished."""
        return bool(self._submitted) or self._scheduler.has_requests

    def step(self) -> FinishedStep | None:
        """Plan and submit a step, if there is anything to run, finish the oldest one if no more may run ahead.

        The caller gives a finished step to `Scheduler.update` before the next call.
        """
        begin = self._clock()
        planned = self._scheduler.schedule()
        if planned is not None:
            now = self._clock()
            self._submitted.append((planned, now - begin, now, self._runner.submit(planned)))
        if len(self._submitted) <= (0 if planned is None else self._runner.steps_ahead):
            return None
        planned, schedule_s, submitted_at, take_result = self._submitted.popleft()
        result = take_result()
        now = self._clock()
        seconds = now - max(submitted_at, self._finished_at)
        self._scheduler.took(planned, now - self._finished_at)
        self._finished_at = now
        return FinishedStep(planned, result, schedule_s, seconds)
