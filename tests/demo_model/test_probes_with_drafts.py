"""The embedded model's answers with and without drafts; `python -m tools.demo_model.speculation` asks many more."""

from __future__ import annotations

from dsv4serve.config import EngineConfig, Numerics
from tools.demo_model.speculation import measure


def test_answers_are_the_same_with_drafts_and_these_are_accepted_as_the_reference_says() -> None:
    found = measure(EngineConfig().model, Numerics.EXACT, ["arithmetic", "json"], 1)
    assert len(found) > 10
    for category in found.values():
        assert category.num_same == category.num_probes == 1
        assert category.num_agreeing == category.num_verifies > 0
