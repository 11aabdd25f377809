"""What requests can ask for, with drafts: the same as without, for accepted and rejected ones."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from support.constrained import END_THINK, VOCABULARY, decode, schema, tag
from support.engine import Engine, greedy
from support.models import oracle_logits, random_ids, small_config, small_transformer

from dsv4serve.runner.adjust import RowAdjustment
from dsv4serve.types import Constraint, FinishReason, Request, RequestOutput, SamplingParams, SlotStart

TRANSFORMER = small_transformer(small_config(), 1)
CONFIG = TRANSFORMER.config

ADJUSTMENTS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6, "presence_penalty": -1.0},
    {"frequency_penalty": 0.9, "num_logprobs": 3},
    {"frequency_penalty": 2.0, "logit_bias": {5: 3.0, 9: -100.0, 11: 1.25}, "banned_token_ids": (7, 8)},
    {"bad_words": ((3,), (20, 21), (40, 41, 42)), "repetition_penalty": 1.1},
    {"thinking_budget": 9, "thinking_end_ids": (90, 91), "logit_bias": {90: -100.0, 91: -100.0}},
    {"stop_token_ids": tuple(range(2, 96, 5)), "min_tokens": 13, "ignore_eos": False},
    {"num_logprobs": 2, "num_prompt_logprobs": 1},
]


def with_and_without(requests: list[Request], rate: float, **settings: Any) -> tuple[Engine, dict[str, RequestOutput]]:
    """Outputs with drafts, of which a share of `rate` is right; they must equal those without."""
    sizes = {"num_slots": 8, "read_vocabulary": lambda: VOCABULARY, **settings}
    plain = Engine(TRANSFORMER, **sizes).run(requests)
    draw = random.Random(0)

    def inject(name: str, index: int, own: int) -> int:
        right = plain[name].token_ids[index] if index < len(plain[name].token_ids) else 4
        wrong = draw.choice([token for token in range(4, 70) if token != right])
        return right if draw.random() < rate else wrong

    engine = Engine(TRANSFORMER, num_draft_tokens=4, inject=inject, **sizes)
    outputs = engine.run(requests)
    for name, expected in plain.items():
        found = outputs[name]
        assert (found.token_ids, found.finish_reason, found.stop_token_id) == (
            expected.token_ids,
            expected.finish_reason,
            expected.stop_token_id,
        )
        assert len(found.logits) == len(found.token_ids)
        for one, other in ((found.logprobs, expected.logprobs), (found.prompt_logprobs, expected.prompt_logprobs)):
            assert [entry.logprob for entry in one] == pytest.approx([entry.logprob for entry in other], abs=1e-4)
            assert [entry.top_ids for entry in one] == [entry.top_ids for entry in other]
    return engine, outputs


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_greedy_requests_with_every_adjustment_in_one_batch(rate: float) -> None:
    requests = [greedy(f"r{n}", random_ids(CONFIG, 20 + n, n), 30, **kind) for n, kind in enumerate(ADJUSTMENTS)]
    engine, outputs = with_and_without(requests, rate)
    stats = engine.scheduler.stats()
    assert (sum(stats.num_accepted) > 0) == (rate > 0)
    assert FinishReason.STOP in {output.finish_reason for output in outputs.values()}


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_grammars(rate: float) -> None:
    """Also behind reasoning, whose end may be a draft, and with drafts behind the end of the grammar."""
    kinds: list[tuple[Constraint, dict[str, Any]]] = [
        (tag({"type": "regex", "pattern": "([a-c][0-3]){5}x"}), {}),
        (schema({"type": "array", "items": {"enum": [0, 1, 2]}, "minItems": 2, "maxItems": 3}), {}),
        (schema({"enum": [True, False]}, after_id=END_THINK), {"thinking_budget": 6, "thinking_end_ids": (END_THINK,)}),
        (tag({"type": "regex", "pattern": "[a-z]{9}"}), {"repetition_penalty": 1.3}),
    ]
    requests = [
        greedy(f"r{n}", random_ids(CONFIG, 20 + n, n), 40, ignore_eos=False, constraint=constraint, **more)
        for n, (constraint, more) in enumerate(kinds)
    ]
    engine, outputs = with_and_without(requests, rate)
    assert (sum(engine.scheduler.stats().num_accepted) > 0) == (rate > 0)
    assert re.fullmatch("([a-c][0-3]){5}x", decode(outputs["r0"].token_ids[:-1]))
    assert re.fullmatch("true|false", decode(outputs["r2"].token_ids[7:-1]))


def test_sampled_drafts_of_grammars_keep_to_them() -> None:
    pattern = "([a-c][0-3]){9}x"
    requests = [
        greedy(
            f"r{n}",
            random_ids(CONFIG, 20, n),
            60,
            temperature=1.0,
            seed=n,
            ignore_eos=False,
            constraint=tag({"type": "regex", "pattern": pattern}),
        )
        for n in range(8)
    ]
    engine = Engine(TRANSFORMER, num_slots=8, num_draft_tokens=3, read_vocabulary=lambda: VOCABULARY)
    outputs = engine.run(requests)
    assert all(re.fullmatch(pattern, decode(output.token_ids[:-1])) for output in outputs.values())
    assert engine.scheduler.stats().num_accepted[0] > 20


def test_a_retraction_between_drafts_changes_no_adjustment() -> None:
    requests = [greedy(f"r{n}", random_ids(CONFIG, 246 + n, n), 24, **kind) for n, kind in enumerate(ADJUSTMENTS[:5])]
    engine, _ = with_and_without(requests, 0.6, num_slots=4, num_pages=4, prefix_cache=False, max_model_len=600)
    assert engine.scheduler.stats().num_retractions >= 1


def test_logprobs_and_logits_of_accepted_drafts_are_the_models_own() -> None:
    request = greedy("r", random_ids(CONFIG, 40, 5), 40, num_logprobs=4, presence_penalty=1.5)
    _, outputs = with_and_without([request], 0.7)
    output = outputs["r"]
    rows = oracle_logits(TRANSFORMER, request.prompt_ids + output.token_ids[:-1])[len(request.prompt_ids) - 1 :]
    found = torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float32) for row in output.logits])
    assert (found - rows).abs().max() < 2e-4
    expected = rows.log_softmax(-1)[torch.arange(len(rows)), output.token_ids].tolist()
    assert [entry.logprob for entry in output.logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_appended_and_taken_back_leaves_no_trace(seed: int) -> None:
    draw = random.Random(seed)
    kind = {key: value for kind in draw.sample(ADJUSTMENTS, 3) for key, value in kind.items()}
    prompt = [draw.randrange(12) for _ in range(5)]
    start = SlotStart(
        slot=0,
        request_id="r",
        sampling=SamplingParams(max_tokens=50, **{**kind, "thinking_budget": 3, "thinking_end_ids": (1,)}),
        num_prompt_tokens=5,
        token_ids=prompt,
    )
    tried, straight = RowAdjustment(start, 1), RowAdjustment(start, 1)
    for _ in range(12):
        drafts = [draw.randrange(12) for _ in range(draw.randint(0, 4))]
        for token in drafts:
            tried.append(token)
        tried.undo(drafts)
        token = draw.randrange(12)
        for adjustment in (tried, straight):
            adjustment.append(token)
        assert (tried.counts, tried.outputs, tried.banned, tried.forced) == (
            straight.counts,
            straight.outputs,
            straight.banned,
            straight.forced,
        )
