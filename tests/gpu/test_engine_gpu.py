"""The device engine on a real GPU: what tests/runner/test_device_engine.py shows by the interpreter, and graphs.

Needs dsv4serve's own requirements too (pydantic-settings, msgspec, ..); without them conftest.py leaves this file out.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.device_engine import Sequences, check_generation, check_layers, check_mtp, check_replay, rounding_noise
from support.device_models import CONFIG, both, checkpoint
from support.engine import Engine, greedy
from support.models import random_ids

from dsv4_kernels import dependent
from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.config import EngineConfig, default_model
from dsv4serve.runner.graphs import bucket_for
from dsv4serve.weights import load_weights

SLOTS = 8


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return both(checkpoint(tmp_path_factory.mktemp("device") / "model"), torch.device("cuda", 0))


def test_every_sublayer_of_a_prefill_equals_the_reference(networks):
    check_layers(*networks, length=300)


@pytest.fixture(scope="module")
def reading():
    """The demo model on CPU and GPU, English for it to read, and how far the GPU may move logits and cache.

    A random model makes much of the 14 bits of a tensor core's sums. The GPU may move both by what the CPU engine makes
    of one rounding of its own input."""
    model = default_model()
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    tokens = ChatTokenizer(model).encode(text)
    ids = {slot: tokens[400 * slot : 400 * slot + 400] for slot in range(4)}
    reference, network = both(model, torch.device("cuda", 0))
    weights = load_weights(EngineConfig(model=model), reference.config)
    noise = [rounding_noise(reference, weights, ids[slot][:256]) for slot in ids]
    return reference, network, ids, tuple(sum(errors) / len(errors) for errors in zip(*noise, strict=True))


def test_chunks_decodes_and_padding_in_one_step_over_a_cache_that_the_cpu_engine_filled(reading):
    *networks, ids, bounds = reading
    sequences = Sequences(*networks, ids)
    sequences.prefill({0: 254})
    sequences.prefill({2: 126})
    sequences.check_step({2: 4, 0: 3, 3: 5}, num_rows=16, bounds=bounds)
    sequences.check_step({3: 1, 0: 1, 2: 1}, num_rows=4, bounds=bounds, times=8)
    sequences.check_step({1: 200, 2: 1, 0: 130, 3: 1}, num_rows=512, bounds=bounds)


def test_verifies_leave_the_state_behind_each_of_their_rows_in_a_bank_of_its_own(reading):
    *networks, ids, bounds = reading
    sequences = Sequences(*networks, ids, num_draft_tokens=3)
    sequences.prefill({0: 126, 2: 30, 3: 253})
    sequences.check_step({0: 4, 2: 1, 1: 200, 3: 2}, num_rows=256, bounds=bounds)
    sequences.check_step({2: 2, 3: 1, 0: 4, 1: 3}, num_rows=16, bounds=bounds)


def test_the_mtp_block_equals_the_reference_and_its_keys_can_be_had_alone(reading):
    *networks, ids, bounds = reading
    check_mtp(*networks, ids[0][:300], bounds)


def requests():
    lengths = [1, 3, 127, 130, 255, 257, 300, 40]
    return [greedy(f"r{n}", random_ids(CONFIG, length, n), 12, return_logits=False) for n, length in enumerate(lengths)]


def test_a_crowd_gets_the_reference_tokens_with_graphs_and_without(networks):
    """Prompts of all lengths arrive one by one; prefixes, tails and pages are those of the CPU engine."""
    reference, network = networks
    arrivals = {f"r{n}": n for n in range(SLOTS)}
    outputs = []
    for uses_graphs in (True, False):
        engine = Engine(network, num_slots=SLOTS, num_pages=32, on_device=True)
        if uses_graphs:
            engine.runner.graphs.capture()
        outputs.append(engine.run(requests(), arrivals))
    check_generation(reference, requests(), outputs[0])
    tokens = [{name: output.token_ids for name, output in each.items()} for each in outputs]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("num_decodes", [1, 3, 8])
def test_a_replayed_graph_has_the_bits_of_the_eager_step(networks, num_decodes):
    engine = Engine(networks[1], num_slots=SLOTS, num_pages=32, on_device=True)
    engine.runner.graphs.capture()
    for request in requests()[:num_decodes]:
        engine.add(request)
    engine.step()
    lengths = [len(request.prompt_ids) for request in requests()[:num_decodes]]
    check_replay(engine.runner, bucket_for(lengths if sum(lengths) < 512 else [512], SLOTS))
    for _ in range(8):
        engine.step()
    check_replay(engine.runner, bucket_for([1] * num_decodes, SLOTS))


def test_kernels_that_are_launched_early_leave_the_bits_of_kernels_one_after_the_other(networks, monkeypatch):
    """A replayed graph of early launches (docs/adr/0009) against the eager step without, often: a race is a matter of
    luck."""
    engine = Engine(networks[1], num_slots=SLOTS, num_pages=32, on_device=True)
    engine.runner.graphs.capture()
    for request in requests():
        engine.add(request)
    for _ in range(8):
        engine.step()
    monkeypatch.setattr(dependent, "ENABLED", False)
    for _ in range(20):
        check_replay(engine.runner, bucket_for([1] * SLOTS, SLOTS))


def test_a_step_is_submitted_without_waiting_for_the_device(networks):
    """Nothing between the plan and the sampled tokens asks the device for a value, pages and tails included."""
    engine = Engine(networks[1], num_slots=SLOTS, num_pages=32, on_device=True)
    engine.runner.graphs.capture()
    for request in requests():
        engine.add(request)
    for _ in range(3):
        engine.step()
    planned = engine.scheduler.schedule()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.runner.submit(planned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
