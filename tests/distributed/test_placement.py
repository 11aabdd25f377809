"""Where experts go: every placement is one, skewed loads spread, copies pay."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4serve.distributed.placement import place_experts, rank_loads


def test_placing_needs_no_torch() -> None:
    code = "import sys, dsv4serve.distributed.placement; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def zipf(num_experts: int, seed: int) -> list[float]:
    loads = [1000.0 / (place + 1) for place in range(num_experts)]
    random.Random(seed).shuffle(loads)
    return loads


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_expert_has_a_place_and_none_two_on_a_rank(data: st.DataObject) -> None:
    loads = data.draw(st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.0, 5.0, 200.0]), min_size=1, max_size=12))
    num_ranks = data.draw(st.integers(1, 6))
    fewest = -(-len(loads) // num_ranks)
    slots = data.draw(st.integers(fewest, fewest + 4))
    placement = place_experts(loads, num_ranks, slots)
    assert len(placement) == num_ranks
    assert {expert for experts in placement for expert in experts} == set(range(len(loads)))
    for experts in placement:
        assert len(experts) <= slots
        assert list(experts) == sorted(set(experts))
    assert sum(rank_loads(loads, placement)) == pytest.approx(sum(loads))
    assert placement == place_experts(loads, num_ranks, slots)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("num_experts", "num_ranks"), [(384, 8), (256, 16), (384, 72)])
def test_skewed_loads_are_even_with_copies(num_experts: int, num_ranks: int, seed: int) -> None:
    loads, without = zipf(num_experts, seed), -(-num_experts // num_ranks)
    mean = sum(loads) / num_ranks
    worst = {
        spare: max(rank_loads(loads, place_experts(loads, num_ranks, without + spare))) / mean for spare in (0, 1, 2)
    }
    if num_experts == num_ranks * without:  # one copy each: the hottest expert alone is too much for a rank
        assert worst[0] >= max(loads) / mean > 1.2
    assert max(worst[1], worst[2]) < 1.05


def test_without_spare_slots_no_rank_has_more_than_greedy_may_have() -> None:
    """LPT is within 4/3 of the best, which is no less than the mean and than the hottest expert."""
    for seed in range(20):
        draw = random.Random(seed)
        loads = [draw.random() ** 3 for _ in range(64)]
        worst = max(rank_loads(loads, place_experts(loads, 4, 64)))
        assert worst <= 4 / 3 * max(sum(loads) / 4, max(loads))


def test_the_hottest_expert_gets_the_spare_slots() -> None:
    placement = place_experts([1.0, 100.0, 1.0, 1.0], num_ranks=4, slots_per_rank=2)
    assert [1 in experts for experts in placement] == [True] * 4
    assert rank_loads([1.0, 100.0, 1.0, 1.0], placement) == [26.0, 26.0, 25.5, 25.5]  # expert 0 has the last one


def test_experts_without_load_are_not_copied() -> None:
    placement = place_experts([0.0] * 4, num_ranks=2, slots_per_rank=4)
    assert sorted(expert for experts in placement for expert in experts) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("loads", "num_ranks", "slots", "message"),
    [
        ([1.0] * 5, 2, 2, "2 ranks of 2 slots for 5 experts"),
        ([], 2, 2, "at least one expert"),
        ([1.0, -1.0], 2, 2, r"the load of expert 1 is -1.0; allowed are 0 and above"),
        ([float("nan")], 1, 1, "the load of expert 0 is nan"),
    ],
)
def test_what_cannot_be_placed(loads: list[float], num_ranks: int, slots: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_experts(loads, num_ranks, slots)
