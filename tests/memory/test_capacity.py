"""Layout byte counts and the capacity plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv4serve.config import ModelConfig, Numerics
from dsv4serve.memory import CacheLayout, plan_capacity
from dsv4serve.types import PAGE_TOKENS, CapacityError

CONFIGS = Path(__file__).parents[2] / "configs" / "models"


def released(name: str) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((CONFIGS / f"{name}.json").read_text()))


@pytest.mark.parametrize(("name", "bytes_per_token"), [("pro", 5031.4), ("flash", 3514.25)])
def test_page_bytes_are_those_of_the_architecture_without_padding(name: str, bytes_per_token: float) -> None:
    """docs/model.md section 14: growing bytes per token with FP8 rows and FP4 index rows."""
    layout = CacheLayout.build(released(name), Numerics.OFFICIAL)
    assert layout.page_bytes / PAGE_TOKENS == pytest.approx(bytes_per_token, abs=0.05)


def test_slot_of_pro_is_window_and_c4_rings_and_running_c128_states() -> None:
    layout = CacheLayout.build(released("pro"), Numerics.OFFICIAL)
    window = 61 * 128 * 584
    c4 = 30 * 8 * 4 * (4 * 512 + 4 * 128)
    c128 = 31 * 3 * 512 * 4
    assert layout.ring_bytes == window + c4
    assert layout.slot_bytes == window + c4 + c128
    assert 7e6 <= layout.slot_bytes <= 10e6
    with_drafts = CacheLayout.build(released("pro"), Numerics.OFFICIAL, num_draft_tokens=3)
    assert with_drafts.slot_bytes == 62 * 131 * 584 + 2 * c4 + 4 * c128 + 4 * 7168 * 2


@pytest.mark.parametrize("name", ["pro", "flash"])
@pytest.mark.parametrize("budget", [2 << 30, 20 << 30, 100 << 30])
def test_plan_stays_within_the_budget_and_serves_the_longest_request(name: str, budget: int) -> None:
    config = released(name)
    layout = CacheLayout.build(config, Numerics.OFFICIAL)
    plan = plan_capacity(layout, budget, 64, config.max_position_embeddings)
    assert plan.total_bytes <= budget
    assert plan.total_bytes > 0.95 * budget or plan.num_pages == 64 * 4096 * 4
    assert plan.num_pages * PAGE_TOKENS >= plan.max_model_len
    assert plan.num_tails >= 1
    assert plan.num_slots == 64


def test_a_budget_that_is_too_small_says_what_would_do() -> None:
    config = released("flash")
    layout = CacheLayout.build(config, Numerics.OFFICIAL)
    with pytest.raises(CapacityError, match=r"too small.*--cache-bytes"):
        plan_capacity(layout, 100 << 20, 64, config.max_position_embeddings, 8192)
    needed = 64 * layout.slot_bytes + 32 * layout.page_bytes + layout.tail_bytes
    plan = plan_capacity(layout, needed, 64, config.max_position_embeddings, 8192)
    assert (plan.num_pages, plan.num_tails, plan.max_model_len) == (32, 1, 8192)


def test_longer_than_the_model_is_refused() -> None:
    config = released("flash")
    layout = CacheLayout.build(config, Numerics.OFFICIAL)
    with pytest.raises(CapacityError, match="max_position_embeddings"):
        plan_capacity(layout, 100 << 30, 4, config.max_position_embeddings, config.max_position_embeddings + 1)
