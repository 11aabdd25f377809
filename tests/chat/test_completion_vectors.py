"""Completions against vectors made with DeepSeek's recipe package."""

import json
from pathlib import Path

import pytest

from dsv4serve.chat.output import OutputParser
from dsv4serve.chat.reasoning import ReasoningSplitter

VECTORS = json.loads((Path(__file__).parents[1] / "golden" / "chat-vectors.json").read_text(encoding="utf-8"))
COMPLETIONS = {vector["id"]: vector for vector in VECTORS["completion"]}


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
