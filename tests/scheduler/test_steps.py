"""What a step contains: decodes first, chunks on page boundaries, tails where they pay, ends where they belong."""

from __future__ import annotations

import pytest
from support.bench import Bench
from support.fake_runner import generate_alone, prompt

from dsv4serve.types import Constraint, FinishReason, InvalidRequest, QueueFull, SchedulerOutput


def chunks(step: SchedulerOutput | None) -> dict[int, int]:
    """Slot -> tokens."""
    assert step is not None
    return {chunk.slot: len(chunk.token_ids) for chunk in step.chunks}


def test_every_decode_runs_in_every_step_while_others_prefill() -> None:
    bench = Bench(num_pages=40, max_step_tokens=256)
    decoding = bench.add("short", prompt(0, 5), max_tokens=30)
    bench.step()
    bench.add("long", prompt(1, 2000), max_tokens=1)
    tokens = 1
    while bench.results["long"].finish_reason is None:
        bench.step()
        tokens += 1
        assert len(bench.results[decoding].token_ids) == tokens


def test_prefill_gets_a_page_even_when_decodes_fill_the_budget() -> None:
    bench = Bench(num_slots=300, num_pages=330, num_tails=0, max_step_tokens=256)
    for index in range(280):
        bench.add(f"r{index}", prompt(index, 3), max_tokens=200)
    while bench.scheduler.stats().num_waiting:
        bench.step()
    bench.add("long", prompt(1, 1000), max_tokens=1)
    for _ in range(4):
        bench.step()
        assert bench.last_step is not None
        assert len(bench.last_step.decodes) == 280
        assert bench.last_step.num_tokens > 280
    assert bench.results["long"].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("length", [1, 255, 256, 257, 600, 768, 1023, 1700])
@pytest.mark.parametrize("max_step_tokens", [256, 300, 511, 1024])
def test_chunks_end_on_page_boundaries_until_the_last(length: int, max_step_tokens: int) -> None:
    bench = Bench(max_step_tokens=max_step_tokens)
    bench.add("r", prompt(0, length), max_tokens=1)
    ends = [0]
    while bench.step() and bench.last_step is not None:
        ends.append(ends[-1] + chunks(bench.last_step)[0])
    assert ends[-1] == length
    assert all(end % 256 == 0 for end in ends[:-1])
    bench.check_results()


def test_running_prefills_come_before_new_requests_and_the_oldest_first() -> None:
    bench = Bench(num_pages=30, max_step_tokens=512, prefix_cache=False)
    for name in "abc":
        bench.add(name, prompt(ord(name), 700), max_tokens=1)
    order, names = [], {}
    while bench.step() and bench.last_step is not None:
        names.update({start.slot: start.request_id for start in bench.last_step.starts})
        order += [(names[chunk.slot], len(chunk.token_ids)) for chunk in bench.last_step.chunks]
    assert order == [("a", 512), ("a", 188), ("b", 256), ("b", 444), ("c", 512), ("c", 188)]


def test_a_conversation_is_reusable_by_its_next_turn() -> None:
    bench = Bench()
    bench.add("first", prompt(0, 200), max_tokens=400)
    bench.run()
    bench.add("second", bench.history("first") + prompt(1, 50))
    bench.run()
    assert bench.results["second"].num_cached_tokens == 512  # of 600: what decode wrote, up to its last page
    bench.check_results()


def test_an_aborted_generation_is_reusable_too() -> None:
    bench = Bench()
    bench.add("first", prompt(0, 200), max_tokens=400)
    for _ in range(100):
        bench.step()
    bench.abort("first")
    bench.add("second", bench.history("first"))
    bench.run()
    assert bench.results["second"].num_cached_tokens == 256


@pytest.mark.parametrize(("length", "cached"), [(256, 0), (257, 256), (512, 256), (513, 512), (700, 512)])
def test_at_least_one_token_of_a_repeated_prompt_is_computed(length: int, cached: int) -> None:
    bench = Bench(max_step_tokens=256)
    for name in ("first", "second"):
        bench.add(name, prompt(0, length))
        bench.run()
    assert bench.results["first"].num_cached_tokens == 0
    assert bench.results["second"].num_cached_tokens == cached
    bench.check_results()


def test_a_shared_system_prompt_is_hit_from_the_third_user_on_at_the_latest() -> None:
    """The first leaves only a tail behind its own question; the second stops where the two part."""
    bench = Bench(max_step_tokens=2048)
    for index in range(3):
        bench.add(f"r{index}", prompt(0, 520) + prompt(1 + index, 300))
        bench.run()
    assert [bench.results[f"r{index}"].num_cached_tokens for index in range(3)] == [0, 0, 512]
    bench.check_results()


def test_requests_of_one_step_with_the_same_prompt_do_not_disturb_each_other() -> None:
    bench = Bench(num_slots=8, num_pages=40, max_step_tokens=4096)
    for index in range(8):
        bench.add(f"r{index}", prompt(0, 400), max_tokens=150, seed=index)
    bench.run()
    bench.check_results()
    bench.check_all_free()


def test_prompt_logits_are_not_taken_from_the_cache() -> None:
    bench = Bench(max_step_tokens=256)
    bench.add("first", prompt(0, 600))
    bench.run()
    bench.add("second", prompt(0, 600), num_prompt_logits=600, return_logits=True)
    bench.run()
    result = bench.results["second"]
    assert result.num_cached_tokens == 0
    assert result.prompt_logits == [b"row %d" % row for row in range(600)]
    assert result.logits == [b"logits %d" % (600 + index) for index in range(4)]


@pytest.mark.parametrize("length", [250, 254])  # retracted while it decodes, while it prefills
def test_prompt_logits_are_sent_once_although_a_retraction_computes_them_again(length: int) -> None:
    bench = Bench(num_slots=2, num_pages=3, max_step_tokens=256, prefix_cache=False)
    bench.add("old", prompt(0, length), max_tokens=300)
    bench.add("new", prompt(1, 400), max_tokens=100, num_prompt_logits=390)
    while bench.step():
        bench.check_books()
    assert bench.scheduler.stats().num_retractions > 0
    assert bench.results["new"].prompt_logits == [b"row %d" % row for row in range(10, 400)]
    bench.check_results()


def test_a_tail_may_be_restored_and_overwritten_in_one_step() -> None:
    """The only tail is read by a hit and given to that request's own snapshot: restores come before snapshots."""
    bench = Bench(num_tails=1, max_step_tokens=2048)
    bench.add("first", prompt(0, 300), max_tokens=1)
    bench.run()
    bench.add("second", prompt(0, 300) + prompt(1, 300), max_tokens=1)
    bench.step()
    step = bench.last_step
    assert step is not None
    assert [start.tail for start in step.starts] == [snapshot.tail for snapshot in step.snapshots] == [0]
    bench.run()
    assert bench.results["second"].num_cached_tokens == 256
    bench.check_results()


def test_a_page_table_is_announced_once_per_run_with_the_shared_pages_in_front() -> None:
    bench = Bench(max_step_tokens=2048)
    bench.add("first", prompt(0, 300))
    bench.run()
    bench.add("second", prompt(0, 300))
    bench.step()
    step = bench.last_step
    assert step is not None
    ((start,), (append,)) = step.starts, step.page_appends
    assert (start.slot, start.num_computed_tokens, start.num_prompt_tokens) == (append.slot, 256, 300)
    assert append.pages[0] == next(iter(bench.scheduler._tree.nodes())).page
    assert len(append.pages) == 2


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_the_context_length_ends_a_request(steps_in_flight: int) -> None:
    bench = Bench(max_model_len=600, steps_in_flight=steps_in_flight)
    for length in (1, 300, 598, 599):
        bench.add(f"r{length}", prompt(length, length), max_tokens=10**9)
    bench.run()
    for length in (1, 300, 598, 599):
        result = bench.results[f"r{length}"]
        assert (len(result.token_ids), result.finish_reason) == (600 - length, FinishReason.LENGTH)
    bench.check_results()


def test_stop_ids_end_a_request_after_min_tokens_and_are_counted() -> None:
    bench = Bench()
    bench.add("free", prompt(0, 10), max_tokens=100)
    bench.run()
    tokens = bench.results["free"].token_ids
    stop = tokens[20]
    first, later = tokens.index(stop), next(index for index in range(21, 100) if tokens[index] == stop)
    bench.add("stops", prompt(0, 10), max_tokens=100, stop_token_ids=(stop,))
    bench.add("waits", prompt(0, 10), max_tokens=100, stop_token_ids=(stop,), min_tokens=22)
    bench.add("exact", prompt(0, 10), max_tokens=100, stop_token_ids=(stop,), min_tokens=21)
    bench.run()
    for name, end in (("stops", first), ("waits", later), ("exact", 20)):
        result = bench.results[name]
        assert result.token_ids == tokens[: end + 1]
        assert (result.finish_reason, result.stop_token_id) == (FinishReason.STOP, stop)


def test_min_tokens_does_not_keep_a_constrained_request_from_its_end() -> None:
    """A complete constraint allows nothing but the end, again and again."""
    bench = Bench()
    bench.add("free", prompt(0, 10), max_tokens=100)
    bench.run()
    stop = bench.results["free"].token_ids[5]
    bench.add("r", prompt(0, 10), max_tokens=100, stop_token_ids=(stop,), min_tokens=50, constraint=Constraint("{}"))
    bench.run()
    assert bench.results["r"].finish_reason is FinishReason.STOP
    assert len(bench.results["r"].token_ids) <= 6


def test_eos_ends_a_request_unless_ignored() -> None:
    bench = Bench()
    bench.add("eos", prompt(3, 10), max_tokens=1000, ignore_eos=False)
    bench.add("ignored", prompt(3, 10), max_tokens=1000)
    bench.run()
    tokens = bench.results["eos"].token_ids
    assert (tokens[-1], bench.results["eos"].stop_token_id) == (0, 0)
    assert bench.results["ignored"].token_ids[: len(tokens)] == tokens
    assert len(bench.results["ignored"].token_ids) == 1000


def test_a_stop_id_as_the_last_allowed_token_is_a_stop() -> None:
    bench = Bench()
    bench.add("free", prompt(0, 10), max_tokens=5)
    bench.run()
    tokens = bench.results["free"].token_ids
    bench.add("both", prompt(0, 10), max_tokens=tokens.index(tokens[4]) + 1, stop_token_ids=(tokens[4],))
    bench.run()
    assert bench.results["both"].finish_reason is FinishReason.STOP


def test_an_abort_ends_a_request_in_every_state() -> None:
    bench = Bench(num_slots=2, num_pages=8, max_step_tokens=256)
    bench.add("decoding", prompt(0, 5), max_tokens=400)
    bench.add("prefilling", prompt(1, 1000), max_tokens=400)
    bench.add("waiting", prompt(2, 5), max_tokens=400)
    for _ in range(3):
        bench.step()
    for name in ("waiting", "prefilling", "decoding"):
        bench.abort(name)
        bench.check_books()
        assert bench.results[name].finish_reason is FinishReason.ABORT
        assert bench.scheduler.abort(name) is None
    assert bench.scheduler.abort("never seen") is None
    assert not bench.step()
    bench.check_all_free()


def test_an_abort_ends_a_retracted_request() -> None:
    bench = Bench(num_slots=2, num_pages=3, prefix_cache=False)
    for index in range(2):
        bench.add(f"r{index}", prompt(index, 250), max_tokens=300)
    while not bench.scheduler.stats().num_retractions:
        bench.step()
    bench.abort("r1")
    bench.check_books()
    bench.run()
    assert bench.results["r0"].token_ids == generate_alone(bench.requests["r0"], 2048)
    assert 0 < len(bench.results["r1"].token_ids) < 300


def test_what_can_never_be_served_is_refused_with_the_numbers() -> None:
    bench = Bench(num_pages=4, max_model_len=2048)
    with pytest.raises(InvalidRequest, match=r"prompt has 2048 tokens.*holds 2048.*at most 2047"):
        bench.add("a", prompt(0, 2048))
    with pytest.raises(InvalidRequest, match=r"prompt has 1000 tokens, with max_tokens 1025; the cache holds 1024"):
        bench.add("b", prompt(0, 1000), max_tokens=25)
    with pytest.raises(InvalidRequest, match="empty"):
        bench.add("c", [])
    with pytest.raises(InvalidRequest, match="max_tokens is 0"):
        bench.add("d", prompt(0, 5), max_tokens=0)
    bench.add("e", prompt(0, 1000), max_tokens=24)
    with pytest.raises(InvalidRequest, match="already in use"):
        bench.scheduler.add(bench.requests["e"])
    bench.run()
    bench.check_results()


def test_a_full_queue_refuses_but_free_slots_do_not_count() -> None:
    bench = Bench(num_slots=2, max_waiting=3)
    for index in range(5):
        bench.add(f"r{index}", prompt(index, 5))
    with pytest.raises(QueueFull, match="5 requests are waiting"):
        bench.add("r5", prompt(5, 5))
    bench.run()
    bench.check_results()


def test_a_runner_that_loses_a_result_is_noticed() -> None:
    bench = Bench()
    bench.add("r", prompt(0, 5))
    step = bench.scheduler.schedule()
    assert step is not None
    result = bench.runner.execute(step)
    result.slots.clear()
    with pytest.raises(RuntimeError, match="step 0 samples 1 tokens; the runner returned 0"):
        bench.scheduler.update(step, result)


def test_counters_count_what_was_computed() -> None:
    bench = Bench(max_step_tokens=256)
    bench.add("a", prompt(0, 600), max_tokens=3)
    bench.run()
    bench.add("b", prompt(0, 600), max_tokens=5)
    bench.run()
    stats = bench.scheduler.stats()
    assert (stats.num_prompt_tokens, stats.num_cached_tokens) == (600 + 88, 512)
    assert (stats.num_generated_tokens, stats.num_finished, stats.num_retractions) == (8, 2, 0)


def test_a_generation_takes_the_oldest_tail_of_the_cache() -> None:
    bench = Bench(num_tails=1)
    bench.add("old", prompt(0, 300), max_tokens=1)
    bench.run()
    bench.add("new", prompt(1, 200), max_tokens=100)
    bench.run()
    bench.add("next turn", bench.history("new"))
    bench.run()
    assert bench.results["next turn"].num_cached_tokens == 256


def test_a_hit_makes_a_prompt_recent() -> None:
    bench = Bench(num_slots=1, num_pages=6)
    for name, seed in (("a", 0), ("b", 1), ("a again", 0)):
        bench.add(name, prompt(seed, 300), max_tokens=1)
        bench.run()
    bench.add("large", prompt(2, 5 * 256 - 1), max_tokens=1)  # one page must go: that of "b"
    bench.run()
    bench.add("a at last", prompt(0, 300), max_tokens=1)
    bench.run()
    assert bench.results["a at last"].num_cached_tokens == 256


def test_an_abort_with_unknown_tokens_in_flight_keeps_nothing_of_them() -> None:
    """The tail stands behind tokens whose values will never be known."""
    bench = Bench(steps_in_flight=4)
    bench.add("r", prompt(0, 254), max_tokens=100)
    for _ in range(3):
        bench.step()
    assert bench.last_step is not None
    assert bench.last_step.snapshots
    bench.abort("r")
    bench.check_books()
    assert not list(bench.scheduler._tree.nodes())
    bench.run()
    bench.check_all_free()


def test_a_snapshot_from_before_a_retraction_is_not_mixed_with_the_pages_after_it() -> None:
    bench = Bench(num_slots=2, num_pages=3, max_step_tokens=600, steps_in_flight=5)
    bench.add("old", prompt(0, 254), max_tokens=100)
    bench.add("new", prompt(1, 300), max_tokens=100)
    for _ in range(3):
        bench.step()
    assert bench.scheduler.stats().num_retractions == 1
    bench.abort("old")
    bench.step()
    assert bench.last_step is not None
    assert [start.request_id for start in bench.last_step.starts] == ["new"]
    bench.scheduler.update(*bench.in_flight.pop(0))
    assert not list(bench.scheduler._tree.nodes())
    bench.check_books()
    bench.run()
    bench.check_results()
    bench.check_all_free()
