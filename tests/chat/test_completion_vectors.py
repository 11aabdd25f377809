"""Completions against vectors made with DeepSeek's recipe package and its encoder."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4serve.chat.detokenizer import StopMatcher
from dsv4serve.chat.grammar import Grammar
from dsv4serve.chat.output import OutputParser
from dsv4serve.chat.render import OutputStart
from dsv4serve.chat.reply import Reply
from dsv4serve.chat.tokenizer import ControlToken

VECTORS = json.loads((Path(__file__).parents[1] / "golden" / "chat-vectors.json").read_text(encoding="utf-8"))
COMPLETIONS = {vector["id"]: vector for vector in VECTORS["completion"]}
MARKERS = {token.value: token for token in (ControlToken.END_THINK, ControlToken.DSML)}


def message_of(reply, has_calls, engine_finish):
    """What the vectors compare."""
    return {
        "reasoning_content": reply.reasoning,
        "content": reply.content,
        "tool_calls": [call["function"] for call in reply.tool_calls],
        "finish_reason": "tool_calls" if has_calls and engine_finish == "stop" else engine_finish,
    }


def by_ids(tokenizer, vector, bounds):
    parser = OutputParser(tokenizer, start=OutputStart(vector["start"]), tools=[] if vector["tools_active"] else None)
    reply = Reply()
    ids = vector["completion_token_ids"]
    for start, end in pairwise([0, *bounds, len(ids)]):
        reply.add(parser.feed(ids[start:end]))
    reply.add(parser.finish(vector["engine_finish"] == "length"))
    return message_of(reply, parser.has_calls, vector["engine_finish"])


def by_characters(vector):
    grammar = Grammar(OutputStart(vector["start"]), [] if vector["tools_active"] else None, StopMatcher([]))
    reply = Reply()
    rest = vector["completion"]
    while rest:
        marker = next((spelling for spelling in MARKERS if rest.startswith(spelling)), None)
        if marker is None:
            grammar.text(rest[0])
        else:
            grammar.marker(MARKERS[marker])
        rest = rest[len(marker or "x") :]
    grammar.finish(vector["engine_finish"] == "length")
    reply.add(grammar.delta)
    return message_of(reply, grammar.num_calls > 0, vector["engine_finish"])


def test_there_are_24_vectors():
    assert len(COMPLETIONS) == 24


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completion_becomes_the_message_in_any_grouping(name, tokenizer):
    vector = COMPLETIONS[name]
    expected = vector.get("dsv4serve_expect", vector["expect"])
    length = len(vector["completion_token_ids"])
    assert by_characters(vector) == expected
    for group in (1, 2, 3, length):
        assert by_ids(tokenizer, vector, range(group, length, group)) == expected


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(COMPLETIONS)), data=st.data())
def test_a_cut_anywhere_gives_the_same_in_any_grouping(name, data, tokenizer):
    whole = COMPLETIONS[name]
    ids = whole["completion_token_ids"][: data.draw(st.integers(0, len(whole["completion_token_ids"])))]
    vector = {**whole, "completion_token_ids": ids, "engine_finish": data.draw(st.sampled_from(["stop", "length"]))}
    bounds = data.draw(st.lists(st.integers(0, len(ids)), max_size=4).map(sorted))
    assert by_ids(tokenizer, vector, bounds) == by_ids(tokenizer, vector, range(1, len(ids)))
