"""Drafts change when a greedy token comes and nothing else: engines with and without them, and the reference model.

Between any two steps all that lies behind a slot's positions is NaN (support.engine), so what a rejected draft has left
could not be read without being seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from support.engine import Engine, check_outputs, greedy
from support.models import random_config, random_ids, small_config, small_transformer

from dsv4serve.model.whole import WholeSequence
from dsv4serve.types import Request

TRANSFORMER = small_transformer(small_config(), 1)
CONFIG = TRANSFORMER.config
Accepts = Callable[[str, int], bool]  # whether the draft of an output is right


def run_with(requests: list[Request], accepts: Accepts, transformer=TRANSFORMER, **settings):
    """Outputs with drafts that are right where `accepts` says so, after the same without any."""
    sizes = {name: settings[name] for name in ("num_slots", "num_pages", "max_step_tokens") if name in settings}
    plain = Engine(transformer, **sizes).run(requests)
    vocab = transformer.config.vocab_size

    def inject(name: str, index: int, own: int) -> int:
        right = plain[name].token_ids[index] if index < len(plain[name].token_ids) else own
        return right if accepts(name, index) else (right + 1) % vocab

    engine = Engine(transformer, inject=inject, **{"num_draft_tokens": 3, **settings})
    outputs = engine.run(requests)
    assert {name: output.token_ids for name, output in outputs.items()} == {
        name: output.token_ids for name, output in plain.items()
    }
    check_outputs(transformer, requests, outputs)
    return engine, outputs


PATTERNS: dict[str, Accepts] = {
    "none": lambda name, index: False,
    "all": lambda name, index: True,
    "alternating": lambda name, index: index % 2 == 0,
    "random": lambda name, index: random.Random(f"{name} {index}").random() < 0.6,
}


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_injected_drafts_over_page_window_and_block_boundaries(pattern: str, num_draft_tokens: int) -> None:
    requests = [greedy(f"r{n}", random_ids(CONFIG, length, n), 90) for n, length in enumerate((1, 60, 100, 210, 250))]
    engine, _ = run_with(requests, PATTERNS[pattern], num_slots=5, num_draft_tokens=num_draft_tokens)
    stats = engine.scheduler.stats()
    rates = [a / d for a, d in zip(stats.num_accepted, stats.num_drafted, strict=True)]
    if pattern == "none":
        assert rates == [0.0] * num_draft_tokens
    if pattern == "all":
        assert rates == [1.0] * num_draft_tokens
        assert stats.num_steps < 90 / num_draft_tokens


@pytest.mark.parametrize("seed", range(6))
def test_random_models_with_their_own_drafts(seed: int) -> None:
    """What the MTP block of a random model proposes, sometimes by chance right."""
    draw = random.Random(seed)
    config = random_config(seed)
    transformer = small_transformer(config, seed)
    requests = [
        greedy(f"r{index}", random_ids(config, draw.choice([1, 30, 130, 256, 300]), 100 * seed + index), 25)
        for index in range(5)
    ]
    arrivals = {request.request_id: draw.randint(0, 10) for request in requests}
    plain = Engine(transformer).run(requests, arrivals)
    engine = Engine(transformer, num_draft_tokens=draw.randint(1, 4), adaptive=draw.choice([True, False]))
    outputs = engine.run(requests, arrivals)
    assert {n: o.token_ids for n, o in outputs.items()} == {n: o.token_ids for n, o in plain.items()}
    check_outputs(transformer, requests, outputs)


@pytest.mark.parametrize("seed", range(4))
def test_prefix_hits_retractions_and_chunks_between_drafts(seed: int) -> None:
    draw = random.Random(seed)
    base = random_ids(CONFIG, 600, 7)
    requests = [
        greedy(f"r{n}", base[: draw.choice([256, 260])] + random_ids(CONFIG, draw.randint(225, 250), n), 60)
        for n in range(8)
    ]
    engine, _ = run_with(requests, PATTERNS["random"], num_slots=3, num_pages=5, max_step_tokens=256)
    stats = engine.scheduler.stats()
    assert stats.num_prefix_hits > 0
    assert stats.num_retractions > 0


@torch.inference_mode()
@pytest.mark.parametrize("num_draft_tokens", [1, 3])
@pytest.mark.parametrize("accepts", PATTERNS.values(), ids=PATTERNS)
def test_drafts_are_those_of_the_block_on_the_whole_sequence(accepts: Accepts, num_draft_tokens: int) -> None:
    """The first draft after any history, computed in chunks, behind a prefix hit, after accepted and rejected drafts,
    is what the block gives when it sees the whole sequence at once."""
    prompt = random_ids(CONFIG, 530, 3)
    plain = Engine(TRANSFORMER).run([greedy("plain", prompt, 60)])["plain"].token_ids
    seen: list[tuple[int, int]] = []

    def inject(name: str, index: int, own: int) -> int:
        if name == "again" and engine.runner._slots.num_outputs[0] == index:
            seen.append((index, own))
        right = plain[index] if index < len(plain) else own
        return right if accepts(name, index) else (right + 1) % CONFIG.vocab_size

    engine = Engine(TRANSFORMER, num_slots=1, num_draft_tokens=num_draft_tokens, inject=inject, max_step_tokens=256)
    engine.run([greedy("first", prompt, 2)])
    output = engine.run([greedy("again", prompt, 60)])["again"]
    assert (output.num_cached_tokens, output.token_ids) == (512, plain)
    expected = mtp_drafts(prompt + output.token_ids)
    assert len(seen) > 10
    assert [own for _, own in seen] == [expected[len(prompt) + index] for index, _ in seen]


def mtp_drafts(ids: list[int]) -> list[int]:
    """The block's greedy token for each index of a sequence, of which it sees those before."""
    assert TRANSFORMER.mtp is not None
    streams = TRANSFORMER(torch.tensor(ids), WholeSequence(len(ids)))
    _, logits = TRANSFORMER.mtp(streams[:-1], torch.tensor(ids[1:]), WholeSequence(len(ids) - 1))
    return [-1, -1, *logits.argmax(-1).tolist()]
