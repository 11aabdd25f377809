"""The device engine on a real GPU: what tests/runner/test_device_engine.py shows by the interpreter, and graphs.

Needs dsv4serve's own requirements too (pydantic-settings, msgspec, ..); without them conftest.py leaves this file out.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.device_engine import JudgedSequences, check_judged, check_layers, check_mtp, check_replay, roundings
from support.device_models import CONFIG, both, checkpoint, stories
from support.engine import Engine, greedy
from support.models import random_ids

from dsv4_kernels import dependent
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
    """The demo model on CPU and GPU, the CPU's with roundings of its embeddings, and stories for them to read.

    The GPU may be off by twice what the worst of eight roundings makes of the same rows. Of the logits they move the
    middle row by 3 to 6 % and the worst one by 13 to 43 %. Hopper's FP8 products with 14 bits, emulated in the
    interpreter, moved each of the 17 errors of the first step by at most 0.88 of that.

    Faults put in by hand that these steps find: the sign of RoPE or a missing sink in any one layer, one window row in
    the place of another in all layers, 12 of the 16 experts of layer 0 that are off by a power of two. Not: such a row
    in one layer (but for one), one row of an expert's weight; a layer's own error is for `check_layers`."""
    reference, network = both(default_model(), torch.device("cuda", 0))
    weights = load_weights(EngineConfig(model=default_model(), num_draft_tokens=1), reference.config)
    return reference, network, roundings(reference, weights), stories(1600)


def judged(reading, **settings):
    *networks, tokens = reading
    return JudgedSequences.build(*networks, {slot: tokens[400 * slot :][:400] for slot in range(4)}, **settings)


def test_chunks_decodes_and_padding_in_one_step_over_a_cache_that_the_cpu_engine_filled(reading):
    sequences = judged(reading)
    sequences.prefill({0: 254})
    sequences.prefill({2: 126})
    sequences.check_step({2: 4, 0: 3, 3: 5}, num_rows=16)
    sequences.check_step({3: 1, 0: 1, 2: 1}, num_rows=4, times=8)
    sequences.check_step({1: 200, 2: 1, 0: 130, 3: 1}, num_rows=512)


def test_verifies_leave_the_state_behind_each_of_their_rows_in_a_bank_of_its_own(reading):
    sequences = judged(reading, num_draft_tokens=3)
    sequences.prefill({0: 126, 2: 30, 3: 253})
    sequences.check_step({0: 4, 2: 1, 1: 200, 3: 2}, num_rows=256)
    sequences.check_step({2: 2, 3: 1, 0: 4, 1: 3}, num_rows=16)


def test_the_mtp_block_equals_the_reference_and_its_keys_can_be_had_alone(reading):
    reference, network, rounded, tokens = reading
    check_mtp(reference, network, tokens[:300], rounded)


def requests(tokens=None):
    """Across windows, ends of C128 blocks and pages; random or cut from `tokens`, of which one or three leave too much
    open."""
    lengths = [1 if tokens is None else 17, 3 if tokens is None else 60, 127, 130, 255, 257, 300, 40]
    if tokens is None:
        prompts = [random_ids(CONFIG, length, n) for n, length in enumerate(lengths)]
    else:
        prompts = [tokens[180 * n :][:length] for n, length in enumerate(lengths)]
    return [greedy(f"r{n}", prompt, 12, return_logits=False) for n, prompt in enumerate(prompts)]


ARRIVALS = {f"r{n}": n for n in range(SLOTS)}  # one by one


def test_a_crowd_gets_the_reference_tokens(reading):
    """Prompts of all lengths arrive one by one; prefixes, tails and pages are those of the CPU engine."""
    reference, network, rounded, tokens = reading
    crowd = requests(tokens)
    engine = Engine(network, num_slots=SLOTS, num_pages=32, on_device=True)
    engine.runner.graphs.capture()
    check_judged(reference, rounded, crowd, engine.run(crowd, ARRIVALS))


def test_a_crowd_gets_the_same_tokens_with_graphs_and_without(networks):
    """Random weights show each bit that differs. They judge no other engine: of 507 tokens that a rounding put in place
    of their reference's choice, up to 2.3 logits behind it, 6 were beyond the bound that stories keep."""
    tokens = []
    for uses_graphs in (True, False):
        engine = Engine(networks[1], num_slots=SLOTS, num_pages=32, on_device=True)
        if uses_graphs:
            engine.runner.graphs.capture()
        tokens.append({name: output.token_ids for name, output in engine.run(requests(), ARRIVALS).items()})
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
