"""Who goes first, who gives way, and that nobody waits for ever."""

from __future__ import annotations

import pytest
from support.bench import Bench
from support.fake_runner import prompt

from dsv4serve.types import FinishReason


def ends_in_order(bench: Bench, max_steps: int = 20000) -> list[str]:
    """Run to the end; the requests in the order in which they ended."""
    order: list[str] = []
    for _ in range(max_steps):
        more = bench.step()
        order += [name for name, result in bench.results.items() if result.finish_reason and name not in order]
        if not more:
            return order
    raise AssertionError("not done")


def test_lower_priority_numbers_run_first_and_equals_in_order_of_arrival() -> None:
    bench = Bench(num_slots=1)
    for name, priority in (("c1", 1), ("b1", 0), ("a1", -1), ("b2", 0), ("a2", -1)):
        bench.add(name, prompt(0, 5), priority=priority)
    assert ends_in_order(bench) == ["a1", "a2", "b1", "b2", "c1"]


def test_waiting_lifts_a_request_by_one_level_per_ageing_time() -> None:
    bench = Bench(num_slots=1, ageing_s=10.0)
    bench.add("old", prompt(0, 5), priority=1)
    bench.now = 9.0
    bench.add("before", prompt(0, 5), priority=0)  # 0.9 levels of waiting do not outweigh one
    bench.now = 11.0
    bench.add("behind", prompt(0, 5), priority=0)
    assert ends_in_order(bench) == ["before", "old", "behind"]


def test_a_stream_of_urgent_requests_does_not_starve_a_patient_one() -> None:
    bench = Bench(num_slots=1, ageing_s=10.0)
    bench.add("patient", prompt(0, 5), max_tokens=1, priority=3)
    for index in range(100):
        bench.add(f"urgent{index}", prompt(0, 5), max_tokens=1, priority=0)
        bench.step()
        bench.now += 1.0
        if bench.results["patient"].finish_reason:
            break
    assert 30 <= index <= 32


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones() -> None:
    """It needs all pages; small ones keep coming. Head of line: nothing behind it starts before it."""
    bench = Bench(num_slots=4, num_pages=8, prefix_cache=False)
    bench.add("small", prompt(0, 5), max_tokens=50)
    bench.step()
    bench.add("large", prompt(1, 1900), max_tokens=100)
    for index in range(40):
        bench.add(f"late{index}", prompt(2, 5), max_tokens=50)
    order = ends_in_order(bench)
    assert order[:2] == ["small", "large"]


def test_the_newest_of_the_lowest_priority_gives_way() -> None:
    bench = Bench(num_slots=4, num_pages=6, prefix_cache=False, ageing_s=1e9)
    for name, priority in (("low-old", 5), ("low-new", 5), ("high-new", 0)):
        bench.add(name, prompt(0, 250), max_tokens=600, priority=priority)
        bench.step()
    retracted = []
    while bench.scheduler.has_requests and len(retracted) < 1:
        bench.step()
        retracted = [state.request_id for state in bench.scheduler._waiting._states]
    assert retracted == ["low-new"]
    bench.run()
    bench.check_results()


def test_a_retracted_request_resumes_before_later_ones_of_its_class() -> None:
    bench = Bench(num_slots=2, num_pages=3, prefix_cache=False)
    bench.add("a", prompt(0, 250), max_tokens=200)
    bench.add("b", prompt(1, 250), max_tokens=200)
    bench.step()
    bench.add("c", prompt(2, 250), max_tokens=1)
    starts: list[str] = []
    while bench.step() and bench.last_step is not None:
        starts += [start.request_id for start in bench.last_step.starts]
    assert starts == ["b", "c"]
    assert bench.scheduler.stats().num_retractions == 1
    bench.check_results()


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("num_pages", [3, 4, 5])
def test_retraction_does_not_go_round_in_a_circle(num_pages: int, prefix_cache: bool) -> None:
    """Each needs all pages at its end. The first in order is never retracted, so retractions are few."""
    bench = Bench(num_slots=8, num_pages=num_pages, max_model_len=num_pages * 256, prefix_cache=prefix_cache)
    for index in range(8):
        bench.add(f"r{index}", prompt(index, 250), max_tokens=10**6)
    first_never_waits = True
    while bench.step():
        open_names = [name for name, result in bench.results.items() if result.finish_reason is None]
        waiting = {state.request_id for state in bench.scheduler._waiting._states}
        first_never_waits &= not open_names or open_names[0] not in waiting or len(open_names) == len(waiting)
    assert first_never_waits
    bench.check_results()
    bench.check_all_free()
    assert bench.scheduler.stats().num_retractions <= 8 * num_pages


def test_urgent_newcomers_and_aged_requests_do_not_retract_each_other_for_ever() -> None:
    bench = Bench(num_slots=4, num_pages=4, max_model_len=1000, ageing_s=0.5, max_waiting=100)
    for index in range(20):
        bench.add(f"r{index}", prompt(index % 2, 255), max_tokens=300, priority=index % 3)
        for _ in range(40):
            bench.now += 0.05
            bench.step()
    bench.run(max_steps=20 * 400)
    assert all(result.finish_reason is FinishReason.LENGTH for result in bench.results.values())
    bench.check_results()


def test_a_blocked_request_does_not_empty_the_cache_before_it_can_start() -> None:
    bench = Bench(num_slots=2, num_pages=8)
    bench.add("cached", prompt(0, 300), max_tokens=1)
    bench.run()
    bench.add("running", prompt(1, 1200), max_tokens=60)
    for _ in range(10):
        bench.step()
    bench.add("blocked", prompt(2, 900), max_tokens=1)
    bench.step()
    assert bench.scheduler.stats().num_waiting == 1
    bench.abort("blocked")
    bench.run()
    bench.add("again", prompt(0, 300), max_tokens=1)
    bench.run()
    assert bench.results["again"].num_cached_tokens == 256


def test_admission_leaves_pages_for_the_growth_of_those_that_run() -> None:
    """With 32 running, two pages are likely to be needed in the next 16 steps: a newcomer that took them would be
    retracted at once."""
    bench = Bench(num_slots=40, num_pages=34, num_tails=0)
    for index in range(32):
        bench.add(f"r{index}", prompt(index, 5), max_tokens=100)
    bench.step()
    bench.add("newcomer", prompt(0, 5))
    bench.step()
    assert bench.scheduler.stats().num_waiting == 1
    bench.abort("r0")
    bench.step()
    assert bench.scheduler.stats().num_waiting == 0


def test_two_at_a_page_boundary_are_served_in_order_not_in_order_of_admission() -> None:
    """One free page, both need it in the same step; the urgent one was admitted later and gets it."""
    bench = Bench(num_slots=2, num_pages=3, prefix_cache=False, ageing_s=1e9)
    bench.add("patient", prompt(0, 250), max_tokens=50, priority=5)
    bench.step()
    bench.add("urgent", prompt(1, 251), max_tokens=50)
    while not bench.scheduler.stats().num_retractions:
        bench.step()
    assert [state.request_id for state in bench.scheduler._waiting._states] == ["patient"]
    assert bench.last_step is not None
    assert [append.slot for append in bench.last_step.page_appends] == bench.last_step.decodes
    bench.run()
    bench.check_results()
