"""The benchmark's forced acceptance has the rate that it was told."""

from __future__ import annotations

import pytest
from support.engine import Engine, greedy
from support.models import random_ids, small_config, small_transformer

from benchmarks.forced import ForcedJudge, chance_of


@pytest.mark.parametrize("num_drafts", [1, 2, 4])
@pytest.mark.parametrize("rate", [0.57, 0.7])
def test_chance_of_each_draft_gives_the_rate_of_all(num_drafts: int, rate: float) -> None:
    chance = chance_of(rate, num_drafts)
    assert sum(chance**place for place in range(1, num_drafts + 1)) == pytest.approx(rate * num_drafts)


def test_drafts_of_a_random_model_are_accepted_at_the_forced_rate() -> None:
    engine = Engine(small_transformer(small_config(), 1), num_draft_tokens=3, num_slots=4)
    engine.runner._sampler.judge = ForcedJudge(chance_of(0.7, 3))
    prompts = [random_ids(small_config(), 20, n) for n in range(4)]
    outputs = engine.run([greedy(f"r{n}", prompt, 200, return_logits=False) for n, prompt in enumerate(prompts)])
    assert all(len(output.token_ids) == 200 for output in outputs.values())
    stats = engine.scheduler.stats()
    assert sum(stats.num_accepted) / sum(stats.num_drafted) == pytest.approx(0.7, abs=0.08)  # 4 deviations
