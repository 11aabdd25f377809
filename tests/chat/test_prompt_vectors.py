"""Prompts and plain completions against vectors made with DeepSeek's own encoder and recipe package."""

import json
from pathlib import Path

import pytest

from dsv4serve.chat.messages import parse_messages
from dsv4serve.chat.output import OutputParser
from dsv4serve.chat.reasoning import ReasoningSplitter
from dsv4serve.chat.render import render

VECTORS = json.loads((Path(__file__).parents[1] / "golden" / "chat-vectors.json").read_text(encoding="utf-8"))
PROMPTS = {vector["id"]: vector for vector in VECTORS["prompt"]}
COMPLETIONS = {vector["id"]: vector for vector in VECTORS["completion"]}


@pytest.mark.parametrize("name", ["P01", "P02", "P04", "P07", "P08", "P09", "P23", "P28"])
def test_prompt_equals_the_official_encoders(name, tokenizer):
    vector = PROMPTS[name]
    request = vector["request"]
    segments = render(parse_messages(request["messages"]), request["thinking"], request.get("drop_thinking", True))
    assert "".join(segments) == vector["prompt"]
    assert tokenizer.encode_segments(segments) == vector["token_ids"]


@pytest.mark.parametrize("group", [1, 2, 3, 10_000])
@pytest.mark.parametrize("name", ["C01", "C02", "C17", "C18", "C19", "C20"])
def test_completion_is_split_the_same_in_any_grouping(name, group, tokenizer):
    vector = COMPLETIONS[name]
    parser = OutputParser(tokenizer, splitter=ReasoningSplitter(vector["start"] == "reasoning"))
    ids = vector["completion_token_ids"]
    deltas = [parser.feed(ids[start : start + group]) for start in range(0, len(ids), group)] + [parser.finish()]
    assert "".join(delta.reasoning for delta in deltas) == vector["expect"]["reasoning_content"]
    assert "".join(delta.content for delta in deltas) == vector["expect"]["content"]
    assert parser.num_tokens == len(ids)


def test_benign_text_has_the_ids_of_a_plain_encode(tokenizer):
    for name in ("P01", "P08", "P09", "P23"):
        assert tokenizer.encode(PROMPTS[name]["prompt"]) == PROMPTS[name]["token_ids"]
