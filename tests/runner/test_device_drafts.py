"""Drafts on the device engine, by Triton's interpreter: they change when a greedy token comes and nothing else.

Between any two steps all that lies behind a slot's positions is NaN (support.engine), so what a rejected draft has left
could not be read without being seen.
"""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.device_drafts import (
    PATTERNS,
    check_drafts,
    check_injected,
    check_judge,
    injected,
    live_state,
    some_requests,
)
from support.device_models import CONFIG, both, checkpoint
from support.engine import Engine, greedy
from support.models import random_ids
from torch.testing import assert_close

from dsv4_kernels.metadata.triton import plan_step
from dsv4_kernels.sampling import COIN, DRAFT, uniform
from dsv4serve.runner.device_batch import empty_inputs, fill_inputs
from dsv4serve.runner.device_drafts import judge
from dsv4serve.types import SamplingParams, SlotStart


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return both(checkpoint(tmp_path_factory.mktemp("device") / "model"), torch.device("cpu"))


def plain(name, length, max_tokens, **sampling):
    return greedy(name, random_ids(CONFIG, length, length), max_tokens, return_logits=False, **sampling)


REQUESTS = [plain("r", 14, 7)]  # grows out of its first window
NUM_COMPUTED = 14 + 7 - 1


@pytest.fixture(scope="module")
def expected(networks):
    """Outputs, and what they leave, of an engine that could make drafts and does not: those of one that cannot."""
    engine = Engine(networks[1], on_device=True, num_draft_tokens=2)
    engine.scheduler._drafts = None
    outputs = engine.run(REQUESTS)
    assert outputs["r"].token_ids == Engine(networks[1], on_device=True).run(REQUESTS)["r"].token_ids
    return outputs, [part.clone() for part in live_state(engine, 0, NUM_COMPUTED)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_injected_drafts_change_no_greedy_token_and_nothing_of_them_stays(networks, expected, pattern):
    """Those that they stand in for are the CPU engine's, also behind accepted and rejected ones."""
    (reference, network), (outputs, state) = networks, expected
    engine = check_injected(network, REQUESTS, outputs, PATTERNS[pattern], num_draft_tokens=2)
    stats = engine.scheduler.stats()
    rates = [a / d for a, d in zip(stats.num_accepted, stats.num_drafted, strict=True)]
    assert pattern == "alternating" or rates == [float(pattern == "all")] * 2
    for found, before in zip(live_state(engine, 0, NUM_COMPUTED), state, strict=True):
        # Between steps the C128 state is rounded: a step of several rows rounds it less often.
        assert_close(found, before, rtol=1e-6 if found.is_floating_point() else 0, atol=0)
    check_drafts(reference, engine, REQUESTS, injected(outputs, PATTERNS[pattern], CONFIG.vocab_size))


def test_requests_with_and_without_drafts_share_steps(networks):
    """One is sampled on the host, one chose its seed: both get no drafts, and the tokens that they get without."""
    requests = [
        plain("drafted", 3, 4),
        greedy("host", random_ids(CONFIG, 4, 8), 4),
        plain("own seed", 5, 4, temperature=1.0, seed=3, is_repeatable=True),
        plain("sampled", 6, 4, temperature=1.0, top_p=0.9, seed=4),
    ]
    expected = Engine(networks[1], on_device=True).run(requests)
    engine = Engine(networks[1], on_device=True, num_draft_tokens=1)
    outputs = engine.run(requests)
    for name in ("drafted", "host", "own seed"):
        assert outputs[name].token_ids == expected[name].token_ids
    assert len(outputs["host"].logits) == len(outputs["sampled"].token_ids) == 4
    assert 2 <= engine.scheduler.stats().num_verifies <= 4  # one or two each


def test_a_verify_whose_request_is_gone_leaves_nothing_to_the_next_one_of_its_slot(networks):
    """Its result comes when the slot has already begun to serve the other."""
    requests = [plain("gone", 3, 20), plain("next", 5, 3)]
    expected = Engine(networks[1], on_device=True).run(requests[1:])
    engine = Engine(networks[1], on_device=True, num_slots=1, num_draft_tokens=1)
    for request in requests:
        engine.add(request)
    while engine.runner.unseen != {0}:
        engine.step()
    engine.abort("gone")
    while engine.outputs["next"].finish_reason is None:
        engine.step()
    assert engine.outputs["next"].token_ids == expected["next"].token_ids


def test_each_random_number_has_its_output_and_stream_and_reaches_the_device(networks):
    """Those of the CPU engine: of the second request, which has two outputs, one draft fewer than the other."""
    runner = Engine(networks[1], on_device=True, num_draft_tokens=2).runner
    for slot, num_outputs in ((1, 0), (3, 2)):
        sampling = SamplingParams(max_tokens=9, seed=40 + slot, temperature=0.5, top_p=0.9, top_k=7, min_p=0.125)
        start = SlotStart(
            slot=slot, request_id="r", sampling=sampling, num_prompt_tokens=5, num_output_tokens=num_outputs
        )
        runner._slots.start(start)
    inputs = empty_inputs(4, pinned=False)
    fill_inputs(inputs, runner._columns([1, 3], [3, 2], [2, 1]))
    found = plan_step(inputs, torch.zeros(12, dtype=torch.int64), runner.forward.left, num_drafts=2)
    assert found.slots.tolist() == [1, 3, -1, -1]
    assert found.places.tolist() == [1, 3, 4, 4]
    assert found.counts.tolist() == [3, 2, 0, 0]
    assert found.num_drafts.tolist() == [2, 1, 0, 0]
    assert found.sampling_rows[:2].tolist() == [[0, 1, 2], [3, 4, 4]]
    assert found.settings["temperature"].tolist() == [0.5, 0.5, 0, 0]
    assert found.settings["top_k"].tolist() == [7, 7, 0, 0]
    for row, (seed, index) in enumerate(((41, 0), (43, 2))):
        assert found.draws[row].tolist() == [uniform(seed, index + place) for place in range(3)]
        assert found.coins[row].tolist() == [uniform(seed, index + place, COIN) for place in range(2)]
        assert found.proposals[:, row].tolist() == [uniform(seed, index + place, DRAFT) for place in range(2)]


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_a_verify_is_judged_as_on_cpu_and_other_rows_are_sampled_as_without_drafts(num_drafts):
    check_judge(torch.device("cpu"), num_drafts)


def test_logits_that_are_not_finite_are_those_of_their_request():
    random = torch.Generator().manual_seed(0)
    requests = some_requests(6, 2, random, torch.device("cpu"))
    logits = torch.randn(6 * 5, 90, generator=random)
    drafts = torch.zeros(6, 2, dtype=torch.int64)
    logits[3 * 4 + 2, 7] = torch.nan  # behind the last draft of the fifth
    _, tokens, is_bad = judge(logits, requests, drafts)
    assert is_bad.tolist() == [False] * 4 + [True, False]
    assert ((tokens >= 0) & (tokens < 90)).all()
