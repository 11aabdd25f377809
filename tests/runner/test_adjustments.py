"""Penalties, bias, bans, reasoning budget and log probabilities through scheduler and runner.

The model of what must come out is a plain loop over the whole-sequence reference model.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.engine import Engine, check_outputs, greedy
from support.models import oracle_logits, random_ids, small_config, small_transformer

from dsv4serve.types import Constraint, FinishReason, Request, RequestOutput, SamplingParams

TRANSFORMER = small_transformer(small_config(), 1)
CONFIG = TRANSFORMER.config

PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6, "presence_penalty": -1.0},
    {"frequency_penalty": 0.9},
    {"presence_penalty": 1.5, "frequency_penalty": -0.4},
    {"frequency_penalty": 2.0, "logit_bias": {5: 3.0, 9: -100.0, 11: 1.25}, "banned_token_ids": (7, 8)},
    {"bad_words": ((3,), (20, 21)), "repetition_penalty": 1.1},
]


def by_hand(request: Request) -> list[int]:
    """Greedy tokens with the request's adjustments, one whole forward a token."""
    params, outputs = request.sampling, []
    for _ in range(params.max_tokens):
        row = oracle_logits(TRANSFORMER, request.prompt_ids + outputs)[-1].tolist()
        for token in range(CONFIG.vocab_size):
            if token in request.prompt_ids or token in outputs:
                repetition = params.repetition_penalty
                row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
            count = outputs.count(token)
            row[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
            row[token] += params.logit_bias.get(token, 0.0)
        for token in params.banned_token_ids:
            row[token] = float("-inf")
        for *head, last in params.bad_words:
            if outputs[len(outputs) - len(head) :] == head:
                row[last] = float("-inf")
        outputs.append(max(range(len(row)), key=row.__getitem__))
    return outputs


def tokens_of(outputs: dict[str, RequestOutput]) -> dict[str, list[int]]:
    return {name: output.token_ids for name, output in outputs.items()}


@pytest.mark.parametrize("settings", PENALTIES, ids=str)
def test_adjusted_tokens_equal_a_hand_written_loop(settings: dict[str, Any]) -> None:
    request = greedy("r", random_ids(CONFIG, 20, 60), 14, **settings)
    assert Engine(TRANSFORMER).run([request])["r"].token_ids == by_hand(request)


def crowd(length: int, max_tokens: int) -> list[Request]:
    """Requests with all kinds of adjustments and one without any."""
    kinds = [*PENALTIES, {}]
    return [
        greedy(f"r{n}", random_ids(CONFIG, length + n, 70 + n), max_tokens, temperature=0.9, seed=n, **settings)
        for n, settings in enumerate(kinds)
    ]


def test_a_request_does_not_depend_on_the_adjustments_of_its_batch() -> None:
    requests = crowd(15, 16)
    together = Engine(TRANSFORMER, num_slots=8).run(requests)
    check_outputs(TRANSFORMER, requests, together)  # the logits that are sent back are the model's own
    for request in requests:
        assert (
            tokens_of(Engine(TRANSFORMER).run([request]))[request.request_id] == together[request.request_id].token_ids
        )


def test_adjustments_survive_retraction() -> None:
    requests = [*crowd(246, 24)[2:6]]
    roomy = Engine(TRANSFORMER, num_slots=4, num_pages=24, prefix_cache=False).run(requests)
    tight_engine = Engine(TRANSFORMER, num_slots=4, num_pages=4, prefix_cache=False, max_model_len=600)
    tight = tight_engine.run(requests)
    assert tight_engine.scheduler.stats().num_retractions >= 1
    assert tokens_of(tight) == tokens_of(roomy)


def test_a_prefix_hit_does_not_hide_the_prompt_from_the_repetition_penalty() -> None:
    prompt = random_ids(CONFIG, 530, 80)
    requests = [greedy(name, prompt, 8, repetition_penalty=1.5) for name in ("first", "again")]
    engine = Engine(TRANSFORMER)
    outputs = engine.run(requests[:1]) | engine.run(requests[1:])
    assert outputs["again"].num_cached_tokens == 512
    assert outputs["again"].token_ids == outputs["first"].token_ids == by_hand(requests[0])


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_the_reasoning_budget_forces_its_end_once(budget: int) -> None:
    prompt = random_ids(CONFIG, 30, 81)
    end = 90
    free = Engine(TRANSFORMER).run([greedy("free", prompt, 12, banned_token_ids=(end,))])["free"].token_ids
    request = greedy("r", prompt, 12, thinking_budget=budget, thinking_end_ids=(end, 91), logit_bias={end: -100.0})
    tokens = Engine(TRANSFORMER).run([request])["r"].token_ids
    assert tokens[: budget + 1] == [*free[:budget], end]
    assert end not in tokens[budget + 1 :]


def test_reasoning_that_ended_by_itself_is_not_ended_again() -> None:
    prompt = random_ids(CONFIG, 30, 82)
    free = Engine(TRANSFORMER).run([greedy("free", prompt, 12)])["free"].token_ids
    for end_ids in ((95, free[2]), (free[2],)):
        request = greedy("r", prompt, 12, thinking_budget=6, thinking_end_ids=end_ids)
        assert Engine(TRANSFORMER).run([request])["r"].token_ids == free


def test_min_tokens_holds_in_a_batch_and_after_it_the_request_ends() -> None:
    prompt = random_ids(CONFIG, 40, 50)
    stop = Engine(TRANSFORMER).run([greedy("free", prompt, 12)])["free"].token_ids[0]
    requests = [
        greedy("held", prompt, 12, stop_token_ids=(stop,), min_tokens=6),
        greedy("short", prompt, 12, stop_token_ids=(stop,)),
        greedy("only", prompt, 12, stop_token_ids=(stop,), min_tokens=3, logit_bias={stop: 100.0}),
    ]
    outputs = Engine(TRANSFORMER).run(requests)
    assert stop not in outputs["held"].token_ids[:6]
    assert outputs["short"].token_ids == [stop]
    assert outputs["only"].token_ids.index(stop) == 3
    assert outputs["only"].finish_reason is FinishReason.STOP


def test_logprobs_are_those_of_the_reference_model_whatever_sampling_does() -> None:
    requests = [
        greedy("plain", random_ids(CONFIG, 33, 83), 8, num_logprobs=0),
        greedy("bent", random_ids(CONFIG, 40, 84), 8, num_logprobs=5, temperature=0.7, seed=3, frequency_penalty=2.0),
        greedy("none", random_ids(CONFIG, 12, 85), 8),
    ]
    outputs = Engine(TRANSFORMER).run(requests)
    assert outputs["none"].logprobs == []
    for request in requests[:2]:
        output = outputs[request.request_id]
        rows = oracle_logits(TRANSFORMER, request.prompt_ids + output.token_ids[:-1]).log_softmax(-1)
        rows = rows[len(request.prompt_ids) - 1 :]
        assert len(output.logprobs) == len(output.token_ids) == 8
        for row, token, entry in zip(rows, output.token_ids, output.logprobs, strict=True):
            assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
            best = row.topk(request.sampling.num_logprobs)
            assert entry.top_ids == best.indices.tolist()
            assert entry.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("length", [1, 2, 256, 257, 700])
def test_prompt_logprobs_equal_a_whole_sequence_forward(length: int) -> None:
    engine = Engine(TRANSFORMER, max_step_tokens=256)
    ids = random_ids(CONFIG, length, 86)
    engine.run([greedy("warm", ids, 2)])  # a prefix that must not be reused
    requests = [greedy("r", ids, 2, num_prompt_logprobs=3), greedy("other", random_ids(CONFIG, 90, 87), 2)]
    outputs = engine.run(requests)
    check_outputs(TRANSFORMER, requests, outputs)
    assert outputs["other"].prompt_logprobs == []
    entries, rows = outputs["r"].prompt_logprobs, oracle_logits(TRANSFORMER, ids).log_softmax(-1)
    assert len(entries) == length - 1
    for position, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(rows[position, ids[position + 1]].item(), abs=1e-4)
        assert entry.top_logprobs == pytest.approx(rows[position].topk(3).values.tolist(), abs=1e-4)


def test_prompt_logprobs_and_logprobs_survive_retraction() -> None:
    draw = random.Random(1)
    requests = [
        greedy(f"r{n}", random_ids(CONFIG, 250, 90 + n), 30, num_prompt_logprobs=draw.choice([0, 2]), num_logprobs=1)
        for n in range(3)
    ]
    engine = Engine(TRANSFORMER, num_slots=3, num_pages=4, prefix_cache=False, max_model_len=600)
    outputs = engine.run(requests)
    assert engine.scheduler.stats().num_retractions >= 1
    for request in requests:
        output = outputs[request.request_id]
        assert (len(output.prompt_logprobs), len(output.logprobs)) == (249, 30)
        whole = request.prompt_ids + output.token_ids
        rows = oracle_logits(TRANSFORMER, whole).log_softmax(-1)
        expected = rows[torch.arange(len(whole) - 1), whole[1:]].tolist()
        got = [entry.logprob for entry in output.prompt_logprobs + output.logprobs]
        assert got == pytest.approx(expected, abs=1e-4)


OTHERS: list[dict[str, Any]] = [
    {"return_logits": True},
    {"num_logprobs": 0},
    {"min_tokens": 1},
    {"thinking_budget": 5},
    {"constraint": Constraint(text="{}")},
]


@pytest.mark.parametrize("kind", PENALTIES + OTHERS, ids=str)
def test_a_request_that_wants_more_than_tokens_says_so(kind: dict[str, Any]) -> None:
    """The device engine makes drafts only for those that do not."""
    assert not SamplingParams(max_tokens=9, **kind).wants_only_tokens
    assert SamplingParams(max_tokens=9, top_p=0.5, top_k=4, min_p=0.1, stop_token_ids=(3,)).wants_only_tokens
