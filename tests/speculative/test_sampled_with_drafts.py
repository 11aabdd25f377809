"""Sampled requests with drafts: the law of their tokens is that of the model, whatever is drafted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.engine import Engine, check_outputs, greedy
from support.models import oracle_logits, random_ids, small_config, small_transformer
from support.statistics import fits, same_source

from dsv4_kernels.sampling import distribution
from dsv4serve.types import Request

TRANSFORMER = small_transformer(
    small_config(vocab_size=24, sliding_window=5, num_hidden_layers=2, compress_ratios=[4, 0, 0]), 3
)
CONFIG = TRANSFORMER.config
PROMPT = random_ids(CONFIG, 9, 1)
NUM_REQUESTS = 3000


def crowd(max_tokens: int, **sampling) -> list[Request]:
    settings = {"temperature": 1.0, "top_p": 0.8, "return_logits": False, **sampling}
    return [greedy(f"r{seed}", PROMPT, max_tokens, seed=seed, **settings) for seed in range(NUM_REQUESTS)]


def tokens(requests: list[Request], **settings) -> list[list[int]]:
    engine = Engine(TRANSFORMER, num_slots=500, num_pages=500, num_tails=0, max_step_tokens=4096, **settings)
    outputs = engine.run(requests)
    if settings:
        accepted = engine.scheduler.stats().num_accepted
        assert accepted[0] > NUM_REQUESTS // 20, "too few accepted drafts to see anything"
    return [outputs[request.request_id].token_ids for request in requests]


def law(history: list[int], **sampling) -> torch.Tensor:
    """Probabilities of the next token."""
    settings = {"temperature": 1.0, "top_p": 0.8, "top_k": 0, "min_p": 0.0, **sampling}
    row = oracle_logits(TRANSFORMER, history)[-1:]
    return distribution(row, **{name: torch.tensor([value]) for name, value in settings.items()})[0]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.7, "top_p": 1.0, "top_k": 6}, {"top_p": 1.0}], ids=str)
def test_tokens_have_the_law_of_the_model_at_each_place(settings: dict[str, float]) -> None:
    """The first token is never drafted; the second one always is, the third one if that was accepted."""
    drawn = tokens(crowd(5, **settings), num_draft_tokens=2)
    first = [row[0] for row in drawn]
    assert fits([first.count(token) for token in range(CONFIG.vocab_size)], law(PROMPT, **settings).tolist())
    for history, following in most_common(drawn, 1) + most_common(drawn, 2):
        counts = [following.count(token) for token in range(CONFIG.vocab_size)]
        assert fits(counts, law(PROMPT + history, **settings).tolist())


def most_common(drawn: list[list[int]], length: int) -> list[tuple[list[int], list[int]]]:
    """The most frequent beginnings of some length, and what followed each."""
    beginnings = Counter(tuple(row[:length]) for row in drawn)
    return [
        (list(begin), [row[length] for row in drawn if tuple(row[:length]) == begin])
        for begin, _ in beginnings.most_common(3)
    ]


def test_pairs_of_tokens_come_as_often_as_without_drafts() -> None:
    """Chi-squared of all neighbours at temperature 1 with top-p, against an engine without speculation."""
    drafted = tokens(crowd(6), num_draft_tokens=3)
    plain = tokens(
        [
            greedy(f"p{n}", PROMPT, 6, seed=10**6 + n, temperature=1.0, top_p=0.8, return_logits=False)
            for n in range(NUM_REQUESTS)
        ]
    )
    for place in range(1, 5):
        counts = [Counter((row[place], row[place + 1]) for row in rows) for rows in (drafted, plain)]
        pairs = sorted(counts[0] | counts[1])
        assert same_source([counts[0][pair] for pair in pairs], [counts[1][pair] for pair in pairs])


def test_a_request_with_a_seed_of_its_own_gets_the_tokens_that_it_gets_without_drafts() -> None:
    requests = [
        greedy(f"r{n}", random_ids(CONFIG, 20 + n, n), 30, temperature=1.0, seed=n, is_repeatable=n % 2 == 0)
        for n in range(6)
    ]
    plain = Engine(TRANSFORMER, num_slots=6).run(requests)
    engine = Engine(TRANSFORMER, num_slots=6, num_draft_tokens=3)
    outputs = engine.run(requests)
    assert engine.scheduler.stats().num_verifies > 0
    check_outputs(TRANSFORMER, requests, outputs)
    for request in requests:
        if request.sampling.is_repeatable:
            assert outputs[request.request_id].token_ids == plain[request.request_id].token_ids


def test_drafts_depend_on_the_request_alone() -> None:
    """With fixed drafts a batch does not change what is drawn either."""
    requests = [greedy(f"r{n}", random_ids(CONFIG, 20 + n, n), 30, temperature=1.0, seed=n) for n in range(5)]
    together = Engine(TRANSFORMER, num_slots=5, num_draft_tokens=2).run(requests)
    for request in requests:
        alone = Engine(TRANSFORMER, num_draft_tokens=2).run([request])
        assert alone[request.request_id].token_ids == together[request.request_id].token_ids
