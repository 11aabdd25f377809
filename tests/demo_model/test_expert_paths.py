"""What is concluded from the measurements of the expert paths."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tools.demo_model.expert_paths import accept_rates, finding


def gates(*shares: float | None) -> list[dict[str, Any]]:
    return [{"suite": f"s{i}", "category": ".*", "measure": "right", "share": share} for i, share in enumerate(shares)]


@pytest.mark.parametrize(
    ("ratio", "fp4_shares", "within"),
    [
        (1.009, (0.995, 0.5, None), (True, True)),
        (1.011, (0.995, 0.5, None), (False, True)),
        (0.98, (1.0, 0.52, None), (False, False)),
        (1.0, (0.985, 0.5, 0.1), (True, False)),  # the last gate was not measured for fp8
    ],
)
def test_finding(ratio: float, fp4_shares: tuple[float | None, ...], within: tuple[bool, bool]) -> None:
    nats = {"fp8": 0.7, "fp4": 0.7 + math.log(ratio)}
    found = finding(nats, {"fp8": gates(1.0, 0.5, None), "fp4": gates(*fp4_shares)})
    assert math.isclose(found["perplexity"], ratio - 1, abs_tol=1e-9)
    assert (found["perplexity_within_bound"], found["gates_within_bound"]) == within


def test_the_gate_that_moved_most_is_named() -> None:
    found = finding({"fp8": 1.0, "fp4": 1.0}, {"fp8": gates(0.5, 0.5), "fp4": gates(0.51, 0.25)})
    assert (found["largest_gate_difference"], found["gate"]) == (-0.25, "s1, .*, right")
    assert finding({"fp8": 1.0, "fp4": 1.0}, {"fp8": gates(None), "fp4": gates(None)})["gates_within_bound"] is False


def test_accept_rates_are_by_position() -> None:
    text = ""
    for name, values in (("draft", (10, 8, 0)), ("accepted", (9, 2, 0))):
        text += f"# TYPE dsv4serve:spec_{name}_tokens counter\n"
        for position, value in enumerate(values):
            text += f'dsv4serve:spec_{name}_tokens_total{{position="{position}"}} {value}\n'
    assert accept_rates(text) == [0.9, 0.25, None]
