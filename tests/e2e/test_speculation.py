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
        free = {"model": "demo", "prompt": "Two", "max_tokens": 40, "temperature": 1}
        assert httpx.post(server.url + "/v1/completions", json=free, timeout=60).status_code == 200
        families = {
            family.name: {sample.labels.get("position"): sample.value for sample in family.samples}
            for family in text_string_to_metric_families(httpx.get(server.url + "/metrics").text)
        }
        drafted, accepted = (families[f"dsv4serve:spec_{name}_tokens"] for name in ("draft", "accepted"))
        assert set(drafted) == set(accepted) == {"1", "2", "3"}
        assert drafted["1"] == families["dsv4serve:spec_verifies"][None] >= 110 / 4  # at most four tokens each
        assert all(accepted[position] <= drafted[position] for position in drafted)
        deadline = time.monotonic() + 20
        # Between the engine's reports of the last minute, so there have to be verifies after the first of them.
        while (acceptance := httpx.get(server.url + "/stats").json()["acceptance"]) is None:
            assert time.monotonic() < deadline
            assert httpx.post(server.url + "/v1/completions", json=free, timeout=60).status_code == 200
            time.sleep(0.2)
        assert 0 <= acceptance["accept_rate"] <= 1
        assert acceptance["accept_length"] >= 1
        assert server.stop() == 0
