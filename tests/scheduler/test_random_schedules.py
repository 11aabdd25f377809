"""Random arrivals, aborts and steps on tiny pools: nothing is lost, shared while written, or computed differently."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.bench import Bench
from support.fake_runner import prompt

from dsv4serve.types import InvalidRequest, QueueFull


class Schedules(RuleBasedStateMachine):
    """One scheduler with its fake runner."""

    bench: Bench

    @initialize(
        num_slots=st.integers(1, 5),
        num_pages=st.integers(2, 12),
        num_tails=st.integers(0, 4),
        max_step_tokens=st.sampled_from([256, 300, 512, 2048]),
        steps_in_flight=st.sampled_from([1, 1, 2, 3]),
        prefix_cache=st.sampled_from([True, True, True, False]),
        num_draft_tokens=st.sampled_from([0, 0, 1, 2, 4]),
        adaptive=st.booleans(),
    )
    def start(self, num_pages: int, **settings: int) -> None:
        self.bench = Bench(num_pages=num_pages, max_model_len=min(1500, num_pages * 256), max_waiting=6, **settings)

    @rule(
        family=st.integers(0, 2),
        shared=st.sampled_from([0, 1, 255, 256, 257, 511, 512, 513, 768, 1000]),
        own=st.integers(0, 300),
        max_tokens=st.sampled_from([1, 2, 30, 300]),
        priority=st.integers(-1, 1),
        ignore_eos=st.booleans(),
        min_tokens=st.sampled_from([0, 0, 40]),
        num_prompt_logits=st.sampled_from([0, 0, 0, 3]),
        is_repeatable=st.booleans(),
    )
    def add(self, family: int, shared: int, own: int, **arguments: int) -> None:
        number = len(self.bench.requests)
        tokens = prompt(family, shared) + prompt(3 + number % 40, own)
        self._add(tokens, **arguments)

    @rule(pick=st.integers(0, 1000), extra=st.integers(1, 100), max_tokens=st.sampled_from([1, 100]))
    def next_turn(self, pick: int, extra: int, max_tokens: int) -> None:
        ended = [name for name, result in self.bench.results.items() if result.finish_reason is not None]
        if ended:
            name = ended[pick % len(ended)]
            self._add(self.bench.history(name) + prompt(45, extra), max_tokens=max_tokens)

    def _add(self, tokens: list[int], **arguments: int) -> None:
        try:
            self.bench.add(f"r{len(self.bench.requests)}", tokens, **arguments)
        except InvalidRequest:
            assert not 1 <= len(tokens) < self.bench.max_model_len
        except QueueFull:
            assert len(self.bench.scheduler._waiting) >= 6

    @rule(pick=st.integers(0, 1000))
    def abort(self, pick: int) -> None:
        if self.bench.requests:
            self.bench.abort(list(self.bench.requests)[pick % len(self.bench.requests)])

    @rule(count=st.sampled_from([1, 1, 3, 40, 300]), seconds=st.sampled_from([0.0, 0.1, 7.0]))
    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.bench.now += seconds
            self.bench.step()

    @rule()
    def flush(self) -> None:
        self.bench.scheduler.flush_prefix_cache()

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "bench"):
            self.bench.check_books()

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.bench.run()
            assert all(result.finish_reason is not None for result in self.bench.results.values())
            self.bench.check_results()
            self.bench.check_all_free()


Schedules.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestSchedules = Schedules.TestCase


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
@pytest.mark.parametrize("num_pages", [4, 7, 20])
def test_a_crowd_gets_the_tokens_each_would_get_alone(num_pages: int, steps_in_flight: int) -> None:
    bench = Bench(num_slots=6, num_pages=num_pages, max_model_len=1000, steps_in_flight=steps_in_flight)
    for index in range(14):
        bench.add(f"r{index}", prompt(index % 3, 200 + 40 * index % 500), max_tokens=100 + 13 * index % 250, seed=index)
    bench.run()
    bench.check_results()
    bench.check_all_free()
    assert bench.scheduler.stats().num_retractions > 0 or num_pages == 20
