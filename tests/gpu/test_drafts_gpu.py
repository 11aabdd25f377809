"""Drafts of the device engine on a real GPU: what tests/runner/test_device_drafts.py shows by the interpreter, graphs,
and the demo model, whose drafts are worth something.

On a GPU the bits of a row depend on how many rows are beside it. So greedy tokens with drafts are held to the CPU
engine's as those without are: the same but for near ties, which are what it itself finds near after one rounding.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.device_drafts import PATTERNS, check_drafts, check_judge, injected, rounding_regret
from support.device_engine import Sequences, check_generation, check_replay, rounded, roundings
from support.device_models import CONFIG, both, checkpoint, stories
from support.engine import Engine, greedy
from support.models import random_ids

from dsv4serve.config import EngineConfig, default_model
from dsv4serve.weights import load_weights

SLOTS = 8
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return both(checkpoint(tmp_path_factory.mktemp("device") / "model"), CUDA)


@pytest.fixture(scope="module")
def reading():
    """The demo model on CPU and GPU, stories for it to read, and how far apart the two may be: relative norms of
    logits, and logits of a token that is chosen in place of another.

    A random model makes much of every rounding, and so does this one of text that is none of its own: of 20 roundings
    of its embeddings one makes it lose 8.5 logits by a token behind 250 of the README's; behind stories none makes it
    lose more than one."""
    tokens = stories(1600)
    reference, network = both(default_model(), CUDA)
    weights = load_weights(EngineConfig(model=default_model()), reference.config)
    one = Sequences(reference, rounded(reference, weights), {0: tokens[:256]})
    noise = one.compare_step({0: 256}, num_rows=256)["median row"]
    near_tie = 2 * rounding_regret(reference, roundings(reference, weights), requests(40, tokens=tokens))
    return reference, network, tokens, noise, near_tie


def requests(max_tokens=20, tokens=None, **sampling):
    """Across windows, ends of C128 blocks and pages; the last one finds the pages of another. Random or cut from
    `tokens`, of which one or three leave too much open."""
    lengths = (1 if tokens is None else 17, 3 if tokens is None else 40, 120, 127, 250, 257, 300)
    settings = {"return_logits": False, **sampling}
    if tokens is None:
        prompts = [random_ids(CONFIG, length, length) for length in lengths]
    else:
        prompts = [tokens[200 * n : 200 * n + length] for n, length in enumerate(lengths)]
    prompts.append(prompts[-1][:280])
    return [greedy(f"r{n}", prompt, max_tokens, **settings) for n, prompt in enumerate(prompts)]


ARRIVALS = {"r6": 2, "r7": 30}


def drafting(network, **settings):
    return Engine(network, num_slots=SLOTS, num_pages=48, on_device=True, num_draft_tokens=2, **settings)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_injected_drafts_change_no_greedy_token(reading, pattern):
    """Those that they stand in for are the CPU engine's, also behind accepted and rejected ones and a prefix hit."""
    reference, network, tokens, noise, near_tie = reading
    crowd = requests(tokens=tokens)
    plain = Engine(network, num_slots=SLOTS, num_pages=48, on_device=True).run(crowd, ARRIVALS)
    check_generation(reference, crowd, plain, near_tie)
    inject = injected(plain, PATTERNS[pattern], network.config.vocab_size)
    engine = drafting(network, inject=inject)
    outputs = engine.run(crowd, ARRIVALS)
    check_generation(reference, crowd, outputs, near_tie)
    stats = engine.scheduler.stats()
    assert stats.num_prefix_hits > 0
    # Near ties may part the histories, behind which no injected draft is meant to be right.
    rate = sum(stats.num_accepted) / sum(stats.num_drafted)
    assert {"none": rate < 0.1, "all": rate > 0.3, "alternating": 0.05 < rate < 0.7}[pattern], rate
    check_drafts(reference, engine, crowd, inject, 2 * noise)  # of the main model, and of the block behind it


def test_the_demo_model_accepts_its_drafts(reading):
    reference, network, tokens, _, near_tie = reading
    crowd = requests(40, tokens=tokens)
    own = Engine(reference, num_draft_tokens=2)
    own.run(crowd)
    engine = drafting(network)
    engine.runner.graphs.capture()
    check_generation(reference, crowd, engine.run(crowd), near_tie)
    rates = [stats.num_accepted[0] / stats.num_drafted[0] for stats in (one.scheduler.stats() for one in (own, engine))]
    assert rates[1] > rates[0] - 0.15, rates


def test_the_blocks_own_drafts_are_the_same_with_graphs_and_without(networks):
    found = []
    for uses_graphs in (True, False):
        engine = drafting(networks[1])
        if uses_graphs:
            engine.runner.graphs.capture()
        outputs = engine.run(requests(), ARRIVALS)
        stats = engine.scheduler.stats()
        found.append(({name: output.token_ids for name, output in outputs.items()}, stats.num_accepted))
    assert found[0] == found[1]


def test_sampled_requests_are_the_same_with_graphs_and_without(networks):
    """All settings in one batch, drafts sampled too."""
    settings = [
        {},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 0.8, "top_p": 0.9},
        {"min_p": 0.05},
        {"temperature": 0.0},
        {"is_repeatable": True},
    ]
    crowd = [
        greedy(f"r{n}", random_ids(CONFIG, 20 + n, n), 30, return_logits=False, seed=n, **{"temperature": 1.0, **each})
        for n, each in enumerate(settings)
    ]
    found = []
    for uses_graphs in (True, False):
        engine = drafting(networks[1])
        if uses_graphs:
            engine.runner.graphs.capture()
        outputs = engine.run(crowd)
        assert all(len(output.token_ids) == 30 for output in outputs.values())
        assert engine.scheduler.stats().num_verifies > 20
        found.append({name: output.token_ids for name, output in outputs.items()})
    assert found[0] == found[1]


class Record:
    """The buckets of an engine's steps."""

    def __init__(self, engine):
        self.buckets = []
        fill = engine.runner.graphs.fill

        def recorded(bucket, *rest):
            self.buckets.append(bucket)
            fill(bucket, *rest)

        engine.runner.graphs.fill = recorded


@pytest.mark.parametrize("num_requests", [1, 3, 8])
def test_a_replayed_graph_has_the_bits_of_the_eager_step(networks, num_requests):
    """A step of verifies, one with a chunk beside them, and one of decodes in an engine with drafts."""
    engine = drafting(networks[1])
    engine.runner.graphs.capture()
    record = Record(engine)

    def run_until(wanted):
        for _ in range(60):
            engine.step()
            if record.buckets and wanted(record.buckets[-1]):
                check_replay(engine.runner, record.buckets[-1])
                return
        raise AssertionError(f"no such step in {record.buckets}")

    for request in requests(60)[: num_requests - (num_requests == SLOTS)]:
        engine.add(request)
    run_until(lambda bucket: bucket.num_drafts == 2 and bucket.num_rows == 3 * bucket.num_requests)
    engine.add(greedy("late", random_ids(CONFIG, 40, 77), 4, return_logits=False))
    run_until(lambda bucket: bucket.num_drafts == 2 and bucket.num_rows > 3 * bucket.num_requests)

    plain = drafting(networks[1])
    plain.runner.graphs.capture()
    record, engine = Record(plain), plain
    for request in requests(60, is_repeatable=True, temperature=1.0)[:num_requests]:
        engine.add(request)
    run_until(lambda bucket: bucket.num_drafts == 0 and bucket.num_rows == bucket.num_requests)


def test_a_verify_is_submitted_without_waiting_for_the_device(networks):
    engine = drafting(networks[1])
    engine.runner.graphs.capture()
    for request in requests():
        engine.add(request)
    while not engine.scheduler.stats().num_verifies:
        engine.step()
    under_way, *_, take_last = engine._pipeline._submitted[-1]
    assert under_way.verifies
    planned = engine.scheduler.schedule()  # behind drafts that nobody has seen
    assert {verify.slot for verify in planned.verifies} & {verify.slot for verify in under_way.verifies}
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_result = engine.runner.submit(planned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.scheduler.update(under_way, take_last())
    result = take_result()
    ended = [chunk.slot for chunk in planned.chunks if chunk.samples]
    assert sorted(result.slots) == sorted([verify.slot for verify in planned.verifies] + planned.decodes + ended)


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_a_verify_is_judged_as_on_cpu_and_other_rows_are_sampled_as_without_drafts(num_drafts):
    check_judge(CUDA, num_drafts)
