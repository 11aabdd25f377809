"""All golden vectors through the reference model and through scheduler, cache and runner (their README says what)."""

from __future__ import annotations

import pytest
from support.models import GOLDEN

from dsv4serve.cli.golden import TOLERANCE, Comparison, GoldenFolder, check_engine, check_reference

FLOATS = {"logits_last32", "greedy_logits", "streams", "mtp_logits", "mtp_streams", "mtp_chain_logits"}


@pytest.fixture(scope="module")
def golden() -> GoldenFolder:
    return GoldenFolder(GOLDEN)


def require_all(result: Comparison) -> None:
    assert TOLERANCE == 5e-5
    assert set(result.floats) == FLOATS
    assert {name: value for name, value in result.floats.items() if value > TOLERANCE} == {}
    assert {name: count for name, count in result.mismatches.items() if count} == {}
    named = set(result.mismatches)
    assert {f"index_sel.layers.{layer}.attn" for layer in (2, 4, 6)} <= named
    assert {f"gate_top.layers.{layer}.ffn" for layer in range(3, 8)} <= named
    assert {"argmax", "greedy_argmax", "mtp_draft_argmax", "mtp_chain_tokens"} <= named


def test_reference_model(golden: GoldenFolder) -> None:
    require_all(check_reference(golden))


@pytest.mark.parametrize("max_step_tokens", [256, 1024])
def test_paged_engine(golden: GoldenFolder, max_step_tokens: int) -> None:
    result = check_engine(golden, max_step_tokens)
    require_all(result)
    assert result.mismatches["greedy_ids"] == 0
