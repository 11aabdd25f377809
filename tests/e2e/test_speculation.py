"""Speculative decoding through the real processes: the same answers, and numbers about the drafts."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.server import serve

pytestmark = pytest.mark.e2e
BODIES: list[dict[str, Any]] = [
    {"prompt": "The sea", "max_tokens": 40, "temperature": 0, "logprobs": 1},
    {"prompt": "A long way " * 60, "max_tokens": 30, "temperature": 0, "frequency_penalty": 0.5},
    {"prompt": "One", "max_tokens": 40, "temperature": 1, "seed": 7},
]
NUM_TOKENS = sum(body["max_tokens"] for body in BODIES)


def scrape(url: str) -> dict[str, dict[str | None, float]]:
    """The server's counters on /metrics, by name without the prefix and by position."""
    page = text_string_to_metric_families(httpx.get(url + "/metrics").text)
    return {
        family.name.removeprefix("dsv4serve:"): {s.labels.get("position"): s.value for s in family.samples}
        for family in page
    }


def answers(url: str) -> list[str]:
    with httpx.Client(base_url=url, timeout=60) as client:
        found = []
        for body in BODIES:
            answer = client.post("/v1/completions", json={"model": "demo", "ignore_eos": True, **body})
            assert answer.status_code == 200, answer.text
            (choice,) = answer.json()["choices"]
            assert answer.json()["usage"]["completion_tokens"] == body["max_tokens"]
            if body.get("logprobs"):
                assert len(choice["logprobs"]["tokens"]) == body["max_tokens"]
            found.append(choice["text"])
        return found


def test_answers_are_the_same_and_drafts_are_counted() -> None:
    with serve("--numerics", "exact") as plain:
        expected = answers(plain.url)
        assert httpx.get(plain.url + "/stats").json()["acceptance"] is None
    with serve("--numerics", "exact", "--num-draft-tokens", "3", "--draft-mode", "fixed") as server:
        assert answers(server.url) == expected
        # The engine's numbers on a scrape are up to half a second old.
        counted, deadline = scrape(server.url), time.monotonic() + 20
        while counted["generation_tokens"][None] < NUM_TOKENS:
            assert time.monotonic() < deadline, counted["generation_tokens"]
            time.sleep(0.1)
            counted = scrape(server.url)
        assert counted["generation_tokens"][None] == NUM_TOKENS
        drafted, accepted = (counted[f"spec_{name}_tokens"] for name in ("draft", "accepted"))
        assert set(drafted) == set(accepted) == {"1", "2", "3"}
        # The first token of an answer is its prompt's, and the last may need no drafts.
        assert drafted["1"] == counted["spec_verifies"][None] >= (NUM_TOKENS - 2 * len(BODIES)) / 4
        assert all(accepted[position] <= drafted[position] for position in drafted)
        free = {"model": "demo", "prompt": "Two", "max_tokens": 40, "temperature": 1}
        deadline = time.monotonic() + 20
        # Between the engine's reports of the last minute, so there have to be verifies after the first of them.
        while (acceptance := httpx.get(server.url + "/stats").json()["acceptance"]) is None:
            assert time.monotonic() < deadline
            assert httpx.post(server.url + "/v1/completions", json=free, timeout=60).status_code == 200
            time.sleep(0.2)
        assert 0 <= acceptance["accept_rate"] <= 1
        assert acceptance["accept_length"] >= 1
        assert server.stop() == 0
