"""Sampling fields through the real processes, on the embedded checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.server import serve

pytestmark = pytest.mark.e2e
CHAT = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with (
        serve("--numerics", "exact") as server,  # official numerics round by the batch, up to 0.2 in a log probability
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as connected,
    ):
        yield connected
        assert server.stop() == 0


def test_sampling_fields_act_on_the_real_model(client: openai.OpenAI) -> None:
    greedy: dict[str, Any] = {"model": "demo", "messages": CHAT, "max_tokens": 24, "temperature": 0, "logprobs": True}
    free = client.chat.completions.create(**greedy, top_logprobs=2, extra_body={"return_token_ids": True}).choices[0]
    assert free.logprobs is not None
    assert free.logprobs.content is not None
    assert [entry.top_logprobs[0].token for entry in free.logprobs.content] == [
        entry.token for entry in free.logprobs.content
    ]
    ids = free.model_extra["token_ids"]  # type: ignore[index]
    assert len(ids) == len(free.logprobs.content)
    short = client.chat.completions.create(**greedy, extra_body={"thinking_token_budget": 2, "ignore_eos": True})
    assert short.usage is not None
    assert short.usage.completion_tokens_details is not None
    assert short.usage.completion_tokens_details.reasoning_tokens == 2
    forced = client.chat.completions.create(**greedy, logit_bias={"20": 100}, extra_body={"return_token_ids": True})
    assert set(forced.choices[0].model_extra["token_ids"]) == {20}  # type: ignore[index]


def test_echoed_logprobs_equal_those_of_generating(client: openai.OpenAI) -> None:
    """What the model said of its own greedy tokens when it chose them is what it says when it reads them."""
    settings: dict[str, Any] = {"model": "demo", "temperature": 0, "logprobs": 1}
    settings["extra_body"] = {"ignore_eos": True, "return_token_ids": True}
    first = client.completions.create(prompt=[0, 300, 301], max_tokens=12, **settings).choices[0]
    ids = first.model_extra["token_ids"]  # type: ignore[index]
    again = client.completions.create(prompt=[0, 300, 301, *ids], max_tokens=0, echo=True, **settings).choices[0]
    assert first.logprobs is not None
    assert again.logprobs is not None
    assert again.logprobs.token_logprobs is not None
    assert again.logprobs.token_logprobs[3:] == pytest.approx(first.logprobs.token_logprobs, abs=1e-3)
