"""Decodes with drafts: how many a step verifies, where they end, what becomes of several new tokens at once."""

from __future__ import annotations

import pytest
from support.bench import Bench
from support.fake_runner import generate_alone, prompt

from dsv4serve.scheduler.drafts import DraftPolicy
from dsv4serve.types import FinishReason


def run_one(bench: Bench, name: str) -> list[list[int]]:
    """Tokens of each step of the only request."""
    steps: list[list[int]] = []
    while bench.results[name].finish_reason is None:
        before = len(bench.results[name].token_ids)
        bench.step()
        steps.append(bench.results[name].token_ids[before:])
    return steps


@pytest.mark.parametrize("accepted", [0, 1, 3])
def test_a_step_gives_a_token_and_one_for_each_accepted_draft(accepted: int) -> None:
    bench = Bench(num_draft_tokens=3)
    bench.runner.accepts = accepted
    bench.add("r", prompt(0, 20), max_tokens=1 + 8 * (accepted + 1), return_logits=True)
    steps = run_one(bench, "r")
    assert [len(tokens) for tokens in steps[:-1]] == [1] + [accepted + 1] * (len(steps) - 2)
    bench.check_results()
    assert (
        bench.results["r"].logits
        == [b"logits %d" % (20 + n) for n in range(1 + 8 * (accepted + 1))][: len(bench.results["r"].token_ids)]
    )
    stats = bench.scheduler.stats()
    assert stats.num_generated_tokens == len(bench.results["r"].token_ids)
    assert stats.num_accepted == [stats.num_drafted[place] if place < accepted else 0 for place in range(3)]


def test_the_page_boundary_is_reached_without_drafts_and_leaves_a_tail() -> None:
    bench = Bench(num_draft_tokens=4)
    bench.runner.accepts = 4
    bench.add("first", prompt(0, 200), max_tokens=100)
    seen = set()
    while bench.results["first"].finish_reason is None:
        bench.step()
        step = bench.last_step
        assert step is not None
        consumed = len(bench.runner.slots[0].consumed)
        seen.add(consumed)
        assert bool(step.snapshots) == (consumed == 256)
        assert not (step.verifies and consumed == 256)
    assert {255, 256} <= seen
    bench.add("second", bench.history("first"))
    bench.run()
    assert bench.results["second"].num_cached_tokens == 256
    bench.check_results()
    bench.check_all_free()


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6, 7, 11])
def test_no_draft_goes_past_max_tokens(max_tokens: int) -> None:
    bench = Bench(num_draft_tokens=4)
    bench.runner.accepts = 4
    bench.add("r", prompt(0, 20), max_tokens=max_tokens)
    while bench.step():
        assert bench.last_step is None or all(
            verify.num_draft_tokens <= max_tokens - 2 for verify in bench.last_step.verifies
        )
    assert len(bench.results["r"].token_ids) == max_tokens
    bench.check_results()


def test_what_is_drafted_behind_a_stop_never_was() -> None:
    alone = Bench()
    alone.add("r", prompt(0, 20), max_tokens=12)
    stop = generate_alone(alone.requests["r"], 2048)[6]
    bench = Bench(num_draft_tokens=4)
    bench.runner.accepts = 4
    bench.add("r", prompt(0, 20), max_tokens=12, stop_token_ids=(stop,), return_logits=True)
    bench.run()
    result = bench.results["r"]
    assert (result.finish_reason, result.stop_token_id) == (FinishReason.STOP, stop)
    assert len(result.logits) == len(result.token_ids)
    bench.check_results()
    assert bench.scheduler.stats().num_generated_tokens == len(result.token_ids)


def test_drafts_take_what_the_budget_leaves_and_prefill_keeps_its_page() -> None:
    bench = Bench(num_slots=100, num_pages=120, num_tails=0, max_step_tokens=450, num_draft_tokens=4)
    for index in range(90):
        bench.add(f"r{index}", prompt(index, 3), max_tokens=60)
    while bench.scheduler.stats().num_waiting or bench.scheduler._prefilling:
        bench.step()
    bench.step()
    assert bench.last_step is not None
    assert [verify.num_draft_tokens for verify in bench.last_step.verifies] == [4] * 90
    bench.add("long", prompt(1, 1000), max_tokens=1)
    bench.step()
    assert bench.last_step.num_tokens <= 450
    assert sum(len(chunk.token_ids) for chunk in bench.last_step.chunks) == 256
    assert {verify.num_draft_tokens for verify in bench.last_step.verifies} == {1}
    bench.run()
    bench.check_results()


def test_sampled_tokens_that_must_repeat_are_drawn_without_drafts_beside_others() -> None:
    bench = Bench(num_draft_tokens=2)
    bench.add("seeded", prompt(0, 20), max_tokens=9, temperature=1.0, is_repeatable=True)
    bench.add("greedy", prompt(1, 20), max_tokens=9, temperature=0.0, is_repeatable=True)
    bench.add("free", prompt(2, 20), max_tokens=9, temperature=1.0)
    bench.step()
    bench.step()
    assert bench.last_step is not None
    assert (bench.last_step.decodes, [verify.slot for verify in bench.last_step.verifies]) == ([0], [1, 2])
    bench.run()
    bench.check_results()


def test_fixed_drafts_are_always_as_many_and_adaptive_ones_follow_what_is_accepted() -> None:
    fixed, adaptive = DraftPolicy(4, adaptive=False), DraftPolicy(4, adaptive=True)
    for policy in (fixed, adaptive):
        for _ in range(600):
            policy.observe(4, 4)
    assert (fixed.choose(1), adaptive.choose(1)) == (4, 4)
    for policy in (fixed, adaptive):
        for _ in range(600):
            policy.observe(4, 0)
    assert (fixed.choose(1), adaptive.choose(1)) == (4, 0)
    for _ in range(600):
        adaptive.observe(4, 1)
    assert adaptive.choose(1) == 1


def test_adaptive_drafts_give_way_to_a_large_batch_and_are_probed_now_and_then() -> None:
    policy = DraftPolicy(3, adaptive=True)
    for _ in range(300):
        policy.observe(3, 2)
    chosen = [policy.choose(num_requests) for num_requests in (1, 16, 256, 4096)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] >= 2
    for _ in range(600):
        policy.observe(3, 0)
    probes = [policy.choose(1) for _ in range(256)]
    assert probes.count(3) == 4
    assert probes.count(0) == 252
