"""The embedded model can do what its card says: a few held-out probes of every kind, through the real server."""

import json

import pytest

from tools.demo_model import evaluate, probing
from tools.demo_model.sample import Probe

NUM = 5  # probes of each category
# Lower than the gates, which are held with 100 probes of each category: one near tie may fall the other way elsewhere.
LEAST = {"stories": 0.8, "arithmetic": 0.8, "json": 0.8, "recall 1,000": 0.8, "recall 3,000": 0.8, "thinking": 0.9}
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Egypt": "Cairo", "Norway": "Oslo",
    "Greece": "Athens", "Peru": "Lima", "Kenya": "Nairobi", "Poland": "Warsaw",
}  # fmt: skip


def capital(country: str, city: str) -> Probe:
    question = f"What is the capital of {country}?"
    messages = [{"role": "user", "content": question}]
    return Probe("capitals", messages, lambda answer: {"right": city in answer.content})


@pytest.mark.e2e
def test_the_embedded_model_answers_held_out_probes(monkeypatch, tmp_path):
    suites = [suite for suite in probing.SUITES if suite != "facts"]  # those need what fetch and extract_facts make
    probes = {suite: probing.held_out(suite, NUM) for suite in suites}
    probes["facts"] = [capital(*item) for item in CAPITALS.items()]
    monkeypatch.setattr(evaluate, "held_out", lambda suite, num: probes[suite])
    evaluate.main(["--out", str(tmp_path / "quality.jsonl")])
    results = json.loads((tmp_path / "quality.jsonl").read_text())["results"]
    shares = {(gate["suite"], gate["measure"]): gate["share"] for gate in results["gates"]}
    assert results["num_failed_requests"] == 0
    for (suite, measure), share in shares.items():
        assert share >= LEAST.get(suite, 0.0), (suite, measure, share)
    assert shares["facts", "right"] >= 0.9
    assert shares["tools", "valid"] >= 0.9
    assert shares["tools", "arguments"] >= 0.8
