"""What is counted and timed."""

from __future__ import annotations

from support.bench import Bench
from support.fake_runner import prompt

from dsv4serve.types import RequestOutput


def test_the_first_output_says_how_long_the_request_waited_and_prefilled() -> None:
    bench = Bench(num_slots=1)
    bench.add("first", prompt(0, 5), max_tokens=2)
    bench.add("second", prompt(1, 5), max_tokens=2)
    times: dict[str, list[tuple[float | None, float | None]]] = {"first": [], "second": []}

    def step() -> None:
        bench.now += 1
        planned = bench.scheduler.schedule()
        assert planned is not None
        bench.now += 10
        for output in bench.scheduler.update(planned, bench.runner.execute(planned)):
            times[output.request_id].append((output.queue_s, output.prefill_s))

    while bench.scheduler.has_requests:
        step()
    assert times == {"first": [(1, 10), (None, None)], "second": [(23, 10), (None, None)]}


def test_a_retraction_does_not_change_the_times_of_the_start() -> None:
    bench = Bench(num_slots=2, num_pages=3, prefix_cache=False)
    bench.add("a", prompt(0, 250), max_tokens=200)
    bench.add("b", prompt(1, 250), max_tokens=200)
    first: list[RequestOutput] = []
    retracted = 0
    while bench.scheduler.has_requests:
        bench.now += 1
        planned = bench.scheduler.schedule()
        assert planned is not None
        first += [o for o in bench.scheduler.update(planned, bench.runner.execute(planned)) if o.queue_s is not None]
        stats = bench.scheduler.stats()
        assert stats.num_retracted <= stats.num_waiting
        retracted = max(retracted, stats.num_retracted)
    assert [(output.request_id, output.queue_s) for output in first] == [("a", 1), ("b", 1)]
    assert retracted == 1
    assert bench.scheduler.stats().num_retracted == 0


def test_prefix_hits_and_evictions() -> None:
    bench = Bench(num_pages=4, num_tails=2)

    def run(name: str, seed: int) -> None:
        bench.add(name, prompt(seed, 600), max_tokens=1)
        while bench.scheduler.has_requests:
            bench.step()

    run("a", 0)
    stats = bench.scheduler.stats()
    assert (stats.num_prefix_hits, stats.num_cached_pages, stats.num_cached_tails) == (0, 2, 1)
    run("b", 0)
    assert bench.scheduler.stats().num_prefix_hits == 1
    run("c", 1)
    stats = bench.scheduler.stats()
    assert (stats.num_evicted_pages, stats.num_evicted_tails) == (2, 1)
