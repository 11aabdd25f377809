"""Requests with one prompt that arrive together, as the choices of n > 1 do: the whole pages are computed once."""

from __future__ import annotations

import pytest
from support.bench import Bench
from support.fake_runner import prompt

from dsv4serve.types import PAGE_TOKENS, FinishReason

N = 8


def bench_with_copies(length: int, **settings) -> Bench:
    bench = Bench(num_slots=N, num_pages=64, **settings)
    for copy in range(N):
        bench.add(f"copy{copy}", prompt(0, length), max_tokens=5, seed=copy)
    return bench


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 255, 256, 257, 512, 700, 1024, 1900])
def test_eight_copies_compute_the_whole_pages_once(length: int, steps_in_flight: int) -> None:
    bench = bench_with_copies(length, steps_in_flight=steps_in_flight)
    bench.run()
    own = length - (length - 1) // PAGE_TOKENS * PAGE_TOKENS  # behind the last page boundary: each computes it
    assert bench.scheduler.stats().num_prompt_tokens == length + (N - 1) * own
    cached = [bench.results[f"copy{copy}"].num_cached_tokens for copy in range(N)]
    assert cached == [0] + [length - own] * (N - 1)
    bench.check_results()
    bench.check_all_free()


def test_copies_that_wait_start_together_once_the_pages_are_there() -> None:
    bench = bench_with_copies(700, max_step_tokens=2048)
    running = []
    while bench.step():
        running.append(bench.scheduler.stats().num_running)
    assert running[:2] == [1, N]  # 512 tokens of the first, then the rest of all


@pytest.mark.parametrize("settings", [{"num_tails": 0}, {"prefix_cache": False}])
def test_nobody_waits_where_nothing_can_be_shared(settings: dict) -> None:
    bench = bench_with_copies(700, max_step_tokens=N * 700, **settings)
    bench.step()
    assert bench.scheduler.stats().num_running == N
    bench.run()
    bench.check_results()


def test_the_others_go_on_when_the_first_is_aborted() -> None:
    bench = bench_with_copies(1900)
    bench.step()
    bench.abort("copy0")
    bench.run()
    assert all(bench.results[f"copy{copy}"].finish_reason is FinishReason.LENGTH for copy in range(1, N))
    bench.check_results()
    bench.check_all_free()


def test_who_shares_only_the_begin_of_a_long_prompt_does_not_wait_for_its_end() -> None:
    bench = Bench(num_pages=32)
    bench.add("long", prompt(0, 1900))
    bench.add("other", prompt(0, 300) + prompt(1, 50))
    bench.step()
    bench.step()
    assert bench.scheduler.stats().num_waiting == 1  # the budget of these steps is the first's
    while bench.scheduler.stats().num_waiting:
        bench.step()
    assert bench.results["long"].token_ids == []
    bench.run()
    bench.check_results()


def test_prefixes_are_shared_only_under_the_same_salt() -> None:
    bench = Bench(num_slots=N, num_pages=64)
    for turn in range(2):
        for salt in ("", "a", "b"):
            bench.add(f"{salt}{turn}", prompt(0, 600), max_tokens=5, salt=salt)
        bench.run()
    cached = {name: result.num_cached_tokens for name, result in bench.results.items()}
    assert cached == {"0": 0, "a0": 0, "b0": 0, "1": 512, "a1": 512, "b1": 512}
    bench.check_results()
    bench.check_all_free()


def test_what_an_answer_leaves_behind_is_under_its_salt() -> None:
    bench = Bench(num_slots=N, num_pages=64)
    bench.add("first", prompt(0, 250), max_tokens=20, salt="a")  # its tail is taken while it decodes
    bench.run()
    known = [*prompt(0, 250), *bench.results["first"].token_ids]
    for salt, num_cached in (("", 0), ("a", 256), ("ab", 0)):
        bench.add(f"next{salt}", known, salt=salt)
        bench.run()
        assert bench.results[f"next{salt}"].num_cached_tokens == num_cached
