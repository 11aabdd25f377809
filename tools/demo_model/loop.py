"""Scheduler and runner in this process, as the engine's step loop drives them, and what each verify came to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dsv4serve.config import EngineConfig
from dsv4serve.engine.pipeline import Pipeline
from dsv4serve.engine.process import build_scheduler
from dsv4serve.runner import Runner
from dsv4serve.types import Request, SamplingParams

Prompt = tuple[list[int], int]  # ids, most tokens of the answer


@dataclass(frozen=True)
class Verified:
    """One verify of a request."""

    index: int  # of its first draft among the request's outputs
    num_drafts: int
    num_accepted: int


@dataclass
class Served:
    """What came of one prompt."""

    ids: list[int] = field(default_factory=list)  # EOS included
    verifies: list[Verified] = field(default_factory=list)
    added_at: float = 0.0  # on the loop's clock, s
    times: list[float] = field(default_factory=list)  # of its outputs, which are one token each without drafts


class Loop:
    """Serves greedy prompts with the settings of `config`; `runner` was built from it. `clock`: seconds, monotonic."""

    def __init__(self, config: EngineConfig, runner: Runner, clock: Callable[[], float] = time.perf_counter) -> None:
        self.runner, self.scheduler = runner, build_scheduler(config, runner)
        self._pipeline = Pipeline(self.scheduler, runner, clock)
        # Of steps that only decode: requests, most drafts, seconds from the end of the step before.
        self.steps: list[tuple[int, int, float]] = []
        self._clock, self._ended_at = clock, 0.0
        self._slots: dict[int, str] = {}

    def serve(
        self,
        prompts: Sequence[Prompt],
        concurrency: int,
        ignore_eos: bool = False,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> list[Served]:
        """All prompts, `concurrency` of them at any time; as soon as it `is_enough` what is open is aborted."""
        served = [Served() for _ in prompts]
        num_open, waiting = 0, list(enumerate(prompts))[::-1]
        while waiting or self._pipeline.has_work:
            while waiting and num_open < concurrency:
                index, (ids, max_tokens) = waiting.pop()
                sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos)
                self.scheduler.add(Request(request_id=str(index), prompt_ids=ids, sampling=sampling))
                served[index].added_at = self._clock()
                num_open += 1
            num_open -= self._step(served)
            if is_enough():
                waiting = []
                for index in range(len(prompts)):
                    self.scheduler.abort(str(index))
        return served

    def _step(self, served: list[Served]) -> int:
        """Submit a step and digest the one that is finished, if any; returns how many requests it ended."""
        step = self._pipeline.step()
        if step is None:
            return 0
        planned, result = step.planned, step.result
        self._slots |= {start.slot: start.request_id for start in planned.starts}
        num_new = dict(zip(result.slots, map(len, result.token_ids), strict=True))
        for verify in planned.verifies:
            one = served[int(self._slots[verify.slot])]
            one.verifies.append(Verified(len(one.ids), verify.num_draft_tokens, num_new[verify.slot] - 1))
        num_ended = 0
        outputs = self.scheduler.update(planned, result)
        now = self._clock()
        if not planned.chunks:
            most = max((verify.num_draft_tokens for verify in planned.verifies), default=0)
            self.steps.append((len(result.slots), most, now - self._ended_at))
        self._ended_at = now
        for output in outputs:
            one = served[int(output.request_id)]
            one.times.append(now)
            one.ids += output.token_ids
            num_ended += output.finish_reason is not None
        return num_ended
