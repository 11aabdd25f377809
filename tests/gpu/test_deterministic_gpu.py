"""Deterministic mode on a real GPU: what tests/runner/test_deterministic_engine.py shows by the interpreter, where a
tensor core adds up. The demo model reads English, alone and in crowds that straddle every threshold between forms.

Needs dsv4serve's own requirements too; without them conftest.py leaves this file out.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.crowd import among, differences, run
from support.device_models import both
from support.engine import Engine, greedy

from dsv4_kernels.deterministic import deterministic
from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.config import default_model

LENGTH, DECODES, SLOTS = 300, 12, 8


@pytest.fixture(scope="module")
def reading():
    """The demo model on the GPU, and English for it to read."""
    model = default_model()
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    return both(model, torch.device("cuda", 0))[1], ChatTokenizer(model).encode(text)


@pytest.fixture(scope="module")
def expected(reading):
    network, tokens = reading
    with deterministic():
        return run(network, tokens[:LENGTH], among([LENGTH - DECODES], DECODES, 0))


CROWDS = {
    "again": among([LENGTH - DECODES], DECODES, 0),
    "one token after the other": among([1], LENGTH - 1, 0),
    "3": among([LENGTH - DECODES], DECODES, 2),
    "3, chunks": among([7, 120, 1, LENGTH - DECODES - 128], DECODES, 2, 200),
    "50": among([LENGTH - DECODES], DECODES, 49),
    "50, chunks": among([64, 2, LENGTH - DECODES - 66], DECODES, 49, 150),
    "200": among([LENGTH - DECODES], DECODES, 199),
    "200, chunks": among([31, 129, LENGTH - DECODES - 160], DECODES, 199, 300),
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_a_request_has_the_same_bits_alone_and_in_any_crowd_and_any_chunks(reading, expected, crowd):
    """Logits of all its rows, and all that the cache holds of it."""
    network, tokens = reading
    with deterministic():
        found = run(network, tokens[:LENGTH], CROWDS[crowd])
    assert not any(differences(found, expected)), differences(found, expected)


def test_without_the_mode_a_crowd_shows(reading, expected):
    network, tokens = reading
    found = [run(network, tokens[:LENGTH], CROWDS[crowd]) for crowd in ("again", "200")]
    assert any(differences(*found))


def test_the_engine_gives_the_same_logits_with_graphs_whoever_else_is_served(reading):
    """Prompts that share prefixes, arrive one by one and are cut into chunks by each other."""
    network, tokens = reading
    requests = [
        greedy(f"r{n}", tokens[: 40 + 61 * n] if n % 2 else tokens[n : n + 200], 10, return_logits=n in (2, 5))
        for n in range(SLOTS)
    ]
    with deterministic():
        crowd = Engine(network, num_slots=SLOTS, num_pages=32, on_device=True)
        crowd.runner.graphs.capture()
        together = crowd.run(requests, {f"r{n}": n for n in range(SLOTS)})
        for request in (requests[2], requests[5]):
            alone = Engine(network, num_slots=SLOTS, num_pages=32, on_device=True).run([request])[request.request_id]
            assert alone.token_ids == together[request.request_id].token_ids
            assert alone.logits == together[request.request_id].logits
