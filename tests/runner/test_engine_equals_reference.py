"""The paged engine (scheduler, cache, runner) against the whole-sequence reference model, token by token.

Each output token must be the argmax of the engine's own logits row, and each row must equal the reference model's row
over the request's own history. All memory is poisoned with NaN before use.
"""

from __future__ import annotations

import random

import pytest
import torch
from support.engine import Engine, check_outputs, greedy
from support.models import oracle_logits, random_config, random_ids, small_config, small_transformer

from dsv4serve.types import PAGE_TOKENS, FinishReason

TRANSFORMER = small_transformer(small_config(), 1)
CONFIG = TRANSFORMER.config


@pytest.mark.parametrize("max_step_tokens", [256, 512, 1024])
@pytest.mark.parametrize("length", [1, 3, 4, 127, 128, 129, 255, 256, 257, 511, 512, 513, 700])
def test_prompt_lengths_around_every_boundary(length: int, max_step_tokens: int) -> None:
    engine = Engine(TRANSFORMER, max_step_tokens=max_step_tokens)
    request = greedy("r", random_ids(CONFIG, length, length), 6)
    outputs = engine.run([request])
    check_outputs(TRANSFORMER, [request], outputs)


@pytest.mark.parametrize("seed", range(8))
def test_random_models_and_batches_with_arrivals_and_aborts(seed: int) -> None:
    """1 to 16 requests of random lengths arrive and are aborted at random steps."""
    draw = random.Random(seed)
    config = random_config(seed)
    transformer = small_transformer(config, seed)
    engine = Engine(transformer, num_slots=draw.choice([2, 5, 16]), num_pages=24, max_step_tokens=512)
    requests = [
        greedy(f"r{index}", random_ids(config, draw.choice([2, 30, 130, 256, 300]), 100 * seed + index), 12)
        for index in range(draw.choice([1, 4, 9, 16]))
    ]
    arrivals = {request.request_id: draw.randint(0, 10) for request in requests}
    aborts = {request.request_id: draw.randint(1, 20) for request in requests if draw.random() < 0.25}
    outputs = engine.run(requests, arrivals, aborts)
    for request in requests:
        if request.request_id not in aborts:
            assert outputs[request.request_id].finish_reason is FinishReason.LENGTH
    check_outputs(transformer, requests, outputs)


@pytest.mark.parametrize("shared", [255, 256, 257, 300, 511, 512, 600])
def test_prefix_hits_of_every_length(shared: int) -> None:
    """Prompts that share `shared` tokens reuse the whole pages of them and continue as if computed. The first one
    leaves a tail at its last page boundary, 512; a fork before that gets its tail from the second prompt on."""
    engine = Engine(TRANSFORMER)
    base = random_ids(CONFIG, 640, 7)
    requests = [greedy("base", base, 4)]
    requests += [greedy(f"fork{n}", base[:shared] + random_ids(CONFIG, 60, 8 + n), 8) for n in range(3)]
    outputs = {}
    for request in requests:
        outputs |= engine.run([request])
    check_outputs(TRANSFORMER, requests, outputs)
    whole = shared // PAGE_TOKENS * PAGE_TOKENS
    cached = [outputs[f"fork{n}"].num_cached_tokens for n in range(3)]
    assert cached == [whole if whole == 512 else 0, whole, whole]


def test_the_next_turn_of_a_conversation_reuses_what_decode_wrote() -> None:
    engine = Engine(TRANSFORMER)
    prompt = random_ids(CONFIG, 200, 9)
    first = greedy("first", prompt, 120)
    outputs = engine.run([first])
    history = prompt + outputs["first"].token_ids
    second = greedy("second", history + random_ids(CONFIG, 20, 10), 8)
    outputs |= engine.run([second])
    assert outputs["second"].num_cached_tokens == PAGE_TOKENS
    check_outputs(TRANSFORMER, [first, second], outputs)


@pytest.mark.parametrize("num_pages", [4, 5, 6])
def test_retraction_resumes_exactly(num_pages: int) -> None:
    """Three requests that fit one by one but not together: some give back their pages and come back."""
    engine = Engine(TRANSFORMER, num_slots=3, num_pages=num_pages, prefix_cache=False, max_model_len=600)
    requests = [greedy(f"r{index}", random_ids(CONFIG, 250, 20 + index), 40 + index) for index in range(3)]
    outputs = engine.run(requests)
    assert engine.scheduler.stats().num_retractions >= (1 if num_pages < 6 else 0)
    check_outputs(TRANSFORMER, requests, outputs)


def test_retraction_with_sampling_draws_the_same_tokens() -> None:
    requests = [
        greedy(f"r{index}", random_ids(CONFIG, 250, 30 + index), 30, temperature=0.8, top_p=0.9, seed=index)
        for index in range(3)
    ]
    roomy = Engine(TRANSFORMER, num_slots=3, num_pages=24, prefix_cache=False).run(requests)
    tight_engine = Engine(TRANSFORMER, num_slots=3, num_pages=4, prefix_cache=False, max_model_len=600)
    tight = tight_engine.run(requests)
    assert tight_engine.scheduler.stats().num_retractions >= 1
    assert {name: output.token_ids for name, output in tight.items()} == {
        name: output.token_ids for name, output in roomy.items()
    }


def test_a_request_does_not_depend_on_its_batch() -> None:
    """Sampled tokens of a request alone and in a crowd are the same (one random number per seed and index)."""
    requests = [
        greedy(f"r{index}", random_ids(CONFIG, 20 + 11 * index, index), 20, temperature=1.0, seed=5 + index)
        for index in range(8)
    ]
    crowd = Engine(TRANSFORMER, num_slots=8).run(requests)
    for request in requests:
        alone = Engine(TRANSFORMER, num_slots=8).run([request])
        assert alone[request.request_id].token_ids == crowd[request.request_id].token_ids


def test_prompt_logits_are_the_reference_rows() -> None:
    engine = Engine(TRANSFORMER)
    ids = random_ids(CONFIG, 300, 40)
    request = greedy("r", ids, 2, num_prompt_logits=70)
    outputs = engine.run([request])
    check_outputs(TRANSFORMER, [request], outputs)
    rows = torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float32) for row in outputs["r"].prompt_logits])
    assert (rows - oracle_logits(TRANSFORMER, ids)[-70:]).abs().max() < 2e-4


def test_min_tokens_forbids_what_would_end_the_request() -> None:
    """Not merely ignored: before min_tokens the stop ids and EOS cannot be drawn, after it they end the request."""
    ids = random_ids(CONFIG, 40, 50)
    free = Engine(TRANSFORMER).run([greedy("free", ids, 12)])["free"].token_ids
    stop = free[0]
    early = Engine(TRANSFORMER).run([greedy("early", ids, 12, stop_token_ids=(stop,))])["early"]
    assert (early.token_ids, early.finish_reason) == ([stop], FinishReason.STOP)
    held = Engine(TRANSFORMER).run([greedy("held", ids, 12, stop_token_ids=(stop,), min_tokens=6)])["held"]
    assert stop not in held.token_ids[:6]
    assert len(held.token_ids) >= 6
