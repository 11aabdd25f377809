"""Decodes with drafts: how many a step verifies, where they end, what becomes of several new tokens at once."""

from __future__ import annotations

import random
from collections.abc import Callable

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


def machine(fixed: float, row: float, draft: float, rates: list[float], most: int = 4):
    """A policy on a machine with these costs, whose drafts are accepted so often. Drives it for some steps of a batch
    and returns how often each number was chosen."""
    policy = DraftPolicy(most, adaptive=True)
    draw = random.Random(0)

    def run(num_requests: int, num_steps: int) -> list[int]:
        chosen = [0] * (most + 1)
        for _ in range(num_steps):
            num = policy.choose(num_requests)
            chosen[num] += 1
            policy.took(num_requests, num, fixed + num_requests * (1 + num) * row + num * draft)
            for _ in range(num_requests if num else 0):
                accepted = 0
                while accepted < num and draw.random() < rates[accepted]:
                    accepted += 1
                policy.observe(num, accepted)
        return chosen

    return run


@pytest.mark.parametrize(
    ("costs", "rates", "best"),
    [
        ((1.0, 0.0, 0.05), [0.9] * 4, 4),  # rows cost nothing and drafts are good
        ((1.0, 0.0, 0.05), [0.9, 0.9, 0.0, 0.0], 2),  # the third one is never right
        ((1.0, 0.0, 0.05), [0.0] * 4, 0),
        ((1.0, 0.1, 0.3), [0.8, 0.3, 0.3, 0.3], 1),  # a slow machine: only the first one pays
        ((0.1, 1.0, 0.3), [0.9] * 4, 0),  # rows are all it costs
    ],
)
def test_adaptive_drafts_are_those_that_give_the_most_tokens_per_second(
    costs: tuple[float, float, float], rates: list[float], best: int
) -> None:
    run = machine(*costs, rates)
    run(1, 600)
    chosen = run(1, 640)
    assert chosen[best] >= 640 - 4 * 5 * 4  # four other numbers, each in five tries of four steps at most


FIRST = 102  # steps after which all numbers of three drafts at most have been tried, one step being submitted ahead


def ahead(policy: DraftPolicy, step_s: Callable[[int, int, int, int], float], num_steps: int, accept: int) -> list[int]:
    """What the policy chose for four requests, on a machine to which one step is submitted ahead. `step_s` of a step's
    index, its drafts, and those of the step before and behind; of each request `accept` drafts are right."""
    chosen = [policy.choose(4)]
    for step in range(num_steps):
        chosen.append(policy.choose(4))
        before = chosen[max(step - 1, 0)]
        policy.took(4, chosen[step], step_s(step, chosen[step], before, chosen[step + 1]))
        for _ in range(4):
            policy.observe(3, accept)
    return chosen


@pytest.mark.parametrize("late", [(0,), (1, 5), (6, 9)], ids=str)
@pytest.mark.parametrize("best", [0, 1, 2, 3])
def test_two_long_steps_among_the_first_of_the_best_number_do_not_hide_it(best: int, late: tuple[int, ...]) -> None:
    """A kernel is loaded, a graph uploaded: such a step takes ten times as long, and only this once."""
    steps = [0] * 4

    def step_s(step: int, num: int, before: int, behind: int) -> float:
        steps[num] += 1
        return (1.0 + 0.1 * num) * (10 if num == best and steps[num] - 1 in late else 1)

    assert set(ahead(DraftPolicy(3, adaptive=True), step_s, FIRST + 120, best)[FIRST + 4 : FIRST + 120]) == {best}


@pytest.mark.parametrize("begin", range(0, 120, 5))
@pytest.mark.parametrize("length", [12, 30, 60])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_time_in_which_the_machine_is_slower_or_faster_says_nothing_of_numbers(
    begin: int, length: int, factor: float
) -> None:
    """None is the best by a tenth. Once it seemed a third dearer after this, for hundreds of steps."""

    def step_s(step: int, num: int, before: int, behind: int) -> float:
        return (1.0, 2.2, 3.3, 4.4)[num] * (factor if begin <= step < begin + length else 1)

    chosen = ahead(DraftPolicy(3, adaptive=True), step_s, FIRST + 200, 3)
    assert chosen[FIRST + 4 :].count(0) >= 200 - 3 * 4 - 4  # each other number is tried once


def test_steps_whose_neighbours_make_them_longer_do_not_count() -> None:
    """As on a small model: a step takes at least what the host does for the one before and the one behind."""
    host_s = [0.15, 0.3, 0.4, 0.5]

    def step_s(step: int, num: int, before: int, behind: int) -> float:
        return max(0.3 + 0.1 * num, host_s[before] + host_s[behind])

    for accept, best in (0, 0), (3, 3):
        chosen = ahead(DraftPolicy(3, adaptive=True), step_s, FIRST + 3000, accept)
        assert chosen[FIRST + 4 :].count(best) > 2700
    policy = DraftPolicy(3, adaptive=True)
    ahead(policy, step_s, FIRST + 3000, 0)
    costs = policy._class(4)._seconds
    assert [cost / costs[0] for cost in costs] == pytest.approx([1.0, 0.6 / 0.3, 0.8 / 0.3, 1.0 / 0.3], rel=0.01)


def test_what_a_number_costs_may_change() -> None:
    """As when another program has taken half of the device: rows were free and are dear, and then free again."""
    seconds = [1.0, 1.1, 1.2, 1.3]
    policy = DraftPolicy(3, adaptive=True)

    def step_s(step: int, num: int, before: int, behind: int) -> float:
        return seconds[num]

    assert ahead(policy, step_s, 400, 3)[-200:].count(3) > 170
    seconds[:] = [1.0, 2.5, 4.0, 5.5]
    assert ahead(policy, step_s, 1500, 3)[-400:].count(0) > 360
    seconds[:] = [1.0, 1.1, 1.2, 1.3]
    assert ahead(policy, step_s, 4000, 3)[-400:].count(3) > 340


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("best", [0, 1, 3])
def test_what_drafts_cost_is_learnt_beside_prompts_too(best: int, share: float) -> None:
    """On a busy server, up to a prompt in each step. What prompts add differs by as much as a draft costs."""
    seconds = {0: (1.0, 2.4, 3.6, 4.8), 1: (1.0, 1.2, 1.8, 2.4), 3: (1.0, 1.1, 1.2, 1.3)}[best]
    policy, draw, chosen = DraftPolicy(3, adaptive=True), random.Random(0), [0] * 4
    for step in range(4000):
        num, num_tokens = policy.choose(16), draw.randint(300, 500) if draw.random() < share else 0
        policy.took(16, num, seconds[num] + num_tokens / 400, num_tokens)
        for _ in range(16):
            policy.observe(3, max(1, best))  # so a step gives 1, 2, 2 and 2 tokens, or up to 4
        chosen[num] += step >= 1000
    if share == 1.0 and best == 0:
        best = 1  # two tokens in 2.4 + 1 seconds for one in 1 + 1: no step is without a prompt
    assert chosen[best] > 2700, chosen


@pytest.mark.parametrize(("share", "every"), [(0.0, 30), (0.5, 73)])
def test_an_hour_without_work_says_nothing(share: float, every: int) -> None:
    """It is in the time of the step behind it. What a draft costs has changed, and is learnt all the same."""
    policy, draw = DraftPolicy(3, adaptive=True), random.Random(0)
    for step in range(8000):
        num, num_tokens = policy.choose(4), 400 if draw.random() < share else 0
        waited = 3600.0 if step % every == every - 1 else 0.0
        cost = (1.0, 1.1, 1.3, 1.6) if step < 500 else (1.0, 1.4, 1.8, 2.2)
        policy.took(4, num, cost[num] + num_tokens / 400 + waited, num_tokens)
        for _ in range(4):
            policy.observe(3, 1)  # so a step gives 1, 2, 2 and 2 tokens, and one draft is the best
    costs = policy._class(4)._seconds
    assert costs[1] / costs[0] == pytest.approx(1.4, rel=0.1)


def test_nothing_is_tried_where_no_request_may_have_drafts() -> None:
    policy = DraftPolicy(3, adaptive=True)
    for step in range(1000):
        assert policy.choose(4) == 3
        policy.took(4, 0, 1.0, step % 2)
    assert not policy._class(4)._firsts._found


def test_a_step_says_nothing_beside_steps_of_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when that has prompts: what the host does for it falls into its neighbours' time."""
    policy, counted = DraftPolicy(3, adaptive=True), []
    monkeypatch.setattr(policy._class(4), "add", lambda *step: counted.append(step))
    for num, num_tokens in ((1, 0), (1, 0), (2, 100), (1, 0), (2, 0), (2, 0), (2, 100), (2, 0), (2, 0), (1, 0)):
        policy.took(4, num, 1.0, num_tokens)
    assert counted == [((0, False), 2, 1.0), ((7, False), 2, 1.0), ((0, True), 2, 1.0)]


def test_adaptive_drafts_depend_on_the_batch_and_each_number_is_tried_now_and_then() -> None:
    run = machine(1.0, 0.02, 0.05, [0.6] * 4)
    for num_requests in (1, 8, 200):
        run(num_requests, 600)
    chosen = {num_requests: run(num_requests, 3000) for num_requests in (1, 8, 200)}
    best = [counts.index(max(counts)) for counts in chosen.values()]
    assert best == sorted(best, reverse=True)
    assert best[0] >= 2
    assert best[-1] == 0
    assert all(count > 0 for count in chosen[200])
    assert sum(chosen[200][1:]) <= 93


def test_adaptive_drafts_notice_that_drafts_have_become_good_or_bad() -> None:
    rates = [0.0] * 2
    run = machine(1.0, 0.0, 0.05, rates, most=2)
    assert run(1, 1000)[0] > 850
    rates[:] = [0.95, 0.95]
    run(1, 4000)  # a probe now and then is all that is seen of them
    assert run(1, 640)[2] > 600
    rates[:] = [0.0, 0.0]
    run(1, 500)
    assert run(1, 640)[0] >= 640 - 2 * 5 * 4


@pytest.mark.parametrize(
    "steps_s",
    [
        (1.0, 1.64, 2.07, 2.4),
        (1.0, 2.1, 2.7, 3.2),
        (1.0, 1.15, 1.3, 1.45),
        (1.0, 4.0, 5.0, 6.0),
    ],  # last: tries are dear
    ids=str,
)
@pytest.mark.parametrize("num_requests", [1, 16])
def test_on_a_machine_whose_speed_drifts_adaptive_loses_little_to_the_best_number(
    steps_s: tuple[float, ...], num_requests: int
) -> None:
    """Costs as measured on two busy cores and guessed for a GPU; what is lost is counted in the machine's own steps."""
    rates, tokens, seconds = [0.9, 0.5, 0.4], 0, 0.0
    for seed in range(4):
        policy, draw, pace = DraftPolicy(3, adaptive=True), random.Random(seed), 1.0
        for step in range(2500):
            if draw.random() < 0.01:
                pace = draw.choice([0.8, 1.0, 1.3, 1.6])
            num = policy.choose(num_requests)
            interrupted = 3.0 if draw.random() < 0.01 else 1.0
            policy.took(num_requests, num, steps_s[num] * pace * interrupted * (1 + abs(draw.gauss(0, 0.2))))
            for _ in range(num_requests):
                accepted = 0
                while accepted < num and draw.random() < rates[accepted]:
                    accepted += 1
                policy.observe(num, accepted)
                tokens += (1 + accepted) * (step >= 500)
            seconds += steps_s[num] * (step >= 500)
    lengths = [1.0, 1.9, 1.9 + 0.45, 1.9 + 0.45 + 0.18]
    best = max(length / cost for length, cost in zip(lengths, steps_s, strict=True))
    assert tokens / (num_requests * seconds) > 0.97 * best


def test_fixed_drafts_are_always_as_many() -> None:
    policy = DraftPolicy(4, adaptive=False)
    for _ in range(600):
        policy.observe(4, 0)
        policy.took(1, 4, 100.0)
    assert {policy.choose(num_requests) for num_requests in (1, 100, 5000)} == {4}


def test_the_scheduler_tells_how_many_prompt_tokens_were_beside_the_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(num_draft_tokens=2, adaptive=True, max_step_tokens=256)
    bench.add("short", prompt(0, 20), max_tokens=200)
    bench.step()
    bench.step()
    bench.add("long", prompt(1, 900), max_tokens=1)
    policy, told = bench.scheduler._drafts, []
    assert policy is not None
    monkeypatch.setattr(policy, "took", lambda *step: told.append(step))
    while bench.step():
        step = bench.last_step
        assert step is not None
        assert told[-1][-1] == sum(len(chunk.token_ids) for chunk in step.chunks)
    assert sum(num_tokens for *_, num_tokens in told) == 900
