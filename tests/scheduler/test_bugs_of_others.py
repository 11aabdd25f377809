"""Bugs that other engines with this model had, by symptom: what each would look like here, and that it does not occur.

Some cannot be written down in this design at all (there is no second paged pool and no mapping between pools); their
tests drive the traffic that broke the others and check the books.
"""

from __future__ import annotations

import pytest
from support.bench import Bench
from support.fake_runner import prompt

from dsv4serve.cache import Pool, PoolError
from dsv4serve.types import PAGE_TOKENS


def test_recycled_page_freed_twice_after_thousands_of_requests() -> None:
    """Elsewhere: a recycled page kept its old window mapping, and another request's window was freed twice."""
    bench = Bench(num_slots=4, num_pages=8, num_tails=3, max_step_tokens=1024)
    for index in range(2500):
        bench.add(f"r{index}", prompt(index % 3, 250 + index % 20), max_tokens=1 + index % 11)
        bench.step()
        if index % 50 == 0:
            bench.check_books()
        if index % 7 == 0:
            bench.abort(f"r{index}")
    bench.run()
    bench.check_results()
    bench.check_all_free()


def test_the_sentinel_id_enters_the_free_list() -> None:
    """Elsewhere: "no page" was the number of a real page and got freed. Here "none" is -1 and no pool takes it."""
    pool = Pool("tail", 3)
    pool.allocate()
    with pytest.raises(PoolError, match="does not exist"):
        pool.release(-1)
    bench = Bench(num_tails=0)  # a request without any tail ends without giving one back
    bench.add("r", prompt(0, 600), max_tokens=300)
    bench.run()
    bench.check_all_free()


@pytest.mark.parametrize("length", [255, 256, 257, 511, 512, 513])
def test_part_of_a_page_keeps_stale_rows_of_its_previous_owner(length: int) -> None:
    """Elsewhere: state was cleared per token while pages are freed whole. Here a page is read only where its owner
    wrote: the fake runner compares every read with the request's own history."""
    bench = Bench(num_slots=1, num_pages=3, max_model_len=768, prefix_cache=False)
    for index in range(6):
        bench.add(f"r{index}", prompt(index, length - 40 * (index % 2)), max_tokens=60)
        bench.run()
    bench.check_results()
    bench.check_all_free()


def test_free_pages_drift_by_one_page_per_conversation() -> None:
    """Elsewhere: one page leaked per turn, seen as free memory shrinking by exactly 256 tokens."""
    bench = Bench(num_pages=12, num_tails=4)
    bench.add("turn0", prompt(0, 200), max_tokens=56)  # ends exactly at a page boundary
    bench.run()
    for turn in range(1, 12):
        history = bench.history(f"turn{turn - 1}")[-900:]
        bench.add(f"turn{turn}", history + prompt(turn, 30), max_tokens=PAGE_TOKENS - 30)
        bench.run()
        stats = bench.scheduler.stats()
        assert (stats.num_free_pages, stats.num_free_tails, stats.num_free_slots) == (12, 4, 4)
    bench.check_results()


def test_a_prefix_hit_reads_the_window_of_another_request() -> None:
    """Elsewhere: the window ring was not part of the cached state. Here a hit restores a tail, or is no hit: the fake
    runner fails when slot state and pages do not tell the same history, and its tokens depend on both."""
    bench = Bench(num_slots=2, num_pages=20)
    shared = prompt(0, 512)
    bench.add("first", shared + prompt(1, 100), max_tokens=300)
    bench.run()
    bench.add("other", prompt(2, 700), max_tokens=300)  # writes its own window into the slots in between
    bench.run()
    bench.add("second", shared + prompt(1, 100) + prompt(3, 20), max_tokens=300)
    bench.run()
    assert bench.results["second"].num_cached_tokens == 512
    bench.check_results()


@pytest.mark.parametrize("length", [257, 300, 600, 1000, 4095])
def test_prompts_shorter_than_4096_tokens_never_hit(length: int) -> None:
    """Elsewhere: the sharing unit was the common multiple of all block sizes. Here it is one page."""
    bench = Bench(num_pages=40, max_model_len=5000, max_step_tokens=2048)
    for name in ("first", "second"):
        bench.add(name, prompt(0, length))
        bench.run()
    assert bench.results["second"].num_cached_tokens == (length - 1) // PAGE_TOKENS * PAGE_TOKENS


@pytest.mark.parametrize("splits", [256, 512, 1024])
def test_the_row_of_the_first_instead_of_the_last_token_of_a_chunk_is_used(splits: int) -> None:
    """Elsewhere: a gather took a request's first row of the step. Here what follows a chunk depends on its last token,
    however the prompt was cut."""
    bench = Bench(max_step_tokens=splits)
    for index in range(3):
        bench.add(f"r{index}", prompt(0, 700 + index), max_tokens=3)
    bench.run()
    bench.check_results()
    assert len({tuple(result.token_ids) for result in bench.results.values()}) == 3


@pytest.mark.parametrize("length", [256, 257, 512, 513])
def test_a_fresh_leaf_never_matches_because_the_frontier_is_off_by_one(length: int) -> None:
    """Elsewhere: the frontier was measured in tokens where keys span one more. The next turn must hit every page."""
    bench = Bench()
    bench.add("first", prompt(0, length), max_tokens=1)
    bench.run()
    bench.add("next turn", bench.history("first") + prompt(1, 10))
    bench.run()
    assert bench.results["next turn"].num_cached_tokens == length // PAGE_TOKENS * PAGE_TOKENS


def test_evicted_cache_is_read_after_it_was_given_away() -> None:
    """Elsewhere: illegal accesses when the cache was under pressure. Hits, evictions and new pages in every step."""
    bench = Bench(num_slots=3, num_pages=9, num_tails=2, max_step_tokens=600)
    for index in range(120):
        bench.add(f"r{index}", prompt(index // 6 % 4, 257 + 128 * (index % 5)), max_tokens=20 + index % 60)
        for _ in range(5):
            bench.step()
        bench.check_books()
    bench.run()
    bench.check_results()
    bench.check_all_free()
    assert bench.scheduler.stats().num_cached_tokens > 0


def test_a_prompt_that_needs_the_whole_cache_waits_for_ever_without_an_error() -> None:
    """Elsewhere: a prompt near the size of a pool was never admitted and blocked all others. Here it runs or is
    refused at once (test_what_can_never_be_served_is_refused_with_the_numbers)."""
    bench = Bench(num_pages=6, num_tails=2, max_model_len=6 * PAGE_TOKENS)
    for index in range(4):
        bench.add(f"small{index}", prompt(index, 300), max_tokens=50)
    bench.add("whole", prompt(9, 6 * PAGE_TOKENS - 1), max_tokens=1)
    bench.add("behind", prompt(10, 300), max_tokens=50)
    bench.run(max_steps=500)
    bench.check_results()


def test_gauges_report_zero_for_compressed_pools() -> None:
    bench = Bench(num_slots=4, num_pages=16, num_tails=6)
    bench.add("r", prompt(0, 600), max_tokens=100)
    for _ in range(4):
        bench.step()
    stats = bench.scheduler.stats()
    assert (stats.num_running, stats.num_free_slots, stats.num_free_pages) == (1, 3, 13)
