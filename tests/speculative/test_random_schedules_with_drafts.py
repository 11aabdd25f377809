"""Random requests, accepted and rejected drafts, prefix hits, retractions and aborts in any order: every token is that
of the whole-sequence reference model on the request's own history, and nothing a rejected draft left is ever read.

All that is free or lies behind a slot's positions is NaN between any two steps (support.engine).
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from support.engine import Engine, check_outputs, greedy
from support.models import random_ids, small_config, small_transformer

from dsv4serve.types import FinishReason, Request

CONFIG = small_config(
    num_hidden_layers=3, compress_ratios=[4, 128, 0, 0], num_hash_layers=0, sliding_window=5, index_topk=16
)
TRANSFORMER = small_transformer(CONFIG, 2)
FAMILY = random_ids(CONFIG, 600, 1)
# Of the known tokens when decoding begins: a few before each boundary of C4, C128 and pages, and far from any.
LENGTHS = [1, 2, 3, 4, 5, 30, 120, 125, 126, 127, 128, 240, 250, 253, 254, 255, 256, 380, 384, 500, 509, 511]
PLAIN: dict[tuple[int, ...], list[int]] = {}  # what an engine without drafts generates
MAX_TOKENS = 24


def plain_tokens(prompt: list[int]) -> list[int]:
    key = tuple(prompt)
    if key not in PLAIN:
        PLAIN[key] = Engine(TRANSFORMER).run([greedy("plain", prompt, MAX_TOKENS)])["plain"].token_ids
    return PLAIN[key]


class Schedules(RuleBasedStateMachine):
    """One engine; each request has its own pattern of right and wrong drafts."""

    engine: Engine

    @initialize(
        num_slots=st.integers(1, 4),
        num_pages=st.integers(3, 9),
        num_tails=st.integers(0, 3),
        num_draft_tokens=st.integers(1, 4),
        adaptive=st.sampled_from([False, False, True]),
        max_step_tokens=st.sampled_from([256, 300, 600]),
    )
    def start(self, **sizes: int) -> None:
        self.requests: dict[str, Request] = {}
        self.patterns: dict[str, list[bool]] = {}
        self.engine = Engine(TRANSFORMER, inject=self.inject, **sizes)

    def inject(self, name: str, index: int, own: int) -> int:
        right = plain_tokens(self.requests[name].prompt_ids)
        pattern = self.patterns[name]
        token = right[index] if index < len(right) else own
        return token if pattern[index % len(pattern)] else (token + 1) % CONFIG.vocab_size

    @rule(
        length=st.sampled_from(LENGTHS),
        own=st.sampled_from([0, 1, 9]),
        max_tokens=st.sampled_from([2, 5, MAX_TOKENS, MAX_TOKENS]),
        pattern=st.lists(st.booleans(), min_size=1, max_size=7),
    )
    def add(self, length: int, own: int, max_tokens: int, pattern: list[bool]) -> None:
        prompt = FAMILY[:length] + random_ids(CONFIG, own, len(self.requests) % 3)
        name = f"r{len(self.requests)}"
        self.requests[name], self.patterns[name] = greedy(name, prompt, max_tokens), pattern
        self.engine.add(self.requests[name])

    @rule(pick=st.integers(0, 1000))
    def abort(self, pick: int) -> None:
        if self.requests:
            self.engine.abort(list(self.requests)[pick % len(self.requests)])

    @rule(count=st.sampled_from([1, 1, 2, 5, 20]))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @rule()
    def flush(self) -> None:
        self.engine.scheduler.flush_prefix_cache()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.run([])
        outputs = self.engine.outputs
        check_outputs(TRANSFORMER, list(self.requests.values()), outputs)
        for name, request in self.requests.items():
            if outputs[name].finish_reason is not FinishReason.ABORT:
                assert outputs[name].token_ids == plain_tokens(request.prompt_ids)[: request.sampling.max_tokens]


Schedules.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=14,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestSchedules = Schedules.TestCase


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 4])
def test_every_boundary_is_crossed_by_every_count_of_accepted_drafts(num_draft_tokens: int) -> None:
    """Each request begins so that position 128 or 256 falls on another draft, and has its own pattern."""
    requests, patterns = [], {}
    for n in range(num_draft_tokens + 2):
        for boundary in (128, 256):
            name = f"r{boundary}-{n}"
            requests.append(greedy(name, FAMILY[: boundary - 3 - n], MAX_TOKENS))
            patterns[name] = [place % (num_draft_tokens + 1) < n for place in range(1, num_draft_tokens + 2)]

    def inject(name: str, index: int, own: int) -> int:
        right = plain_tokens(FAMILY[: len(by_name[name].prompt_ids)])
        token = right[index] if index < len(right) else own
        return token if patterns[name][index % len(patterns[name])] else (token + 1) % CONFIG.vocab_size

    by_name = {request.request_id: request for request in requests}
    engine = Engine(
        TRANSFORMER, num_slots=len(requests), num_pages=40, inject=inject, num_draft_tokens=num_draft_tokens
    )
    outputs = engine.run(requests)
    check_outputs(TRANSFORMER, requests, outputs)
    for name, request in by_name.items():
        assert outputs[name].token_ids == plain_tokens(request.prompt_ids)
    stats = engine.scheduler.stats()
    assert all(0 < right < drafted for right, drafted in zip(stats.num_accepted, stats.num_drafted, strict=True))
