"""Ids that are remembered are the ids that would be computed anew, and the memory has its limit."""

import sys
from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import random_conversations

from dsv4serve.chat.encoded_texts import EncodedTexts
from dsv4serve.chat.messages import parse_messages
from dsv4serve.chat.render import render
from dsv4serve.chat.tokenizer import ControlToken, join_texts
from dsv4serve.types import InvalidRequest

SIZE = sys.getsizeof("x") + sys.getsizeof(array("I", [0]))


def fresh_ids(tokenizer, segments):
    """What encode_segments must give, without any memory."""
    ids = []
    for run in join_texts(segments):
        is_control = isinstance(run, ControlToken)
        ids += [tokenizer.control_ids[run]] if is_control else tokenizer._texts._encode(run)
    return ids


@settings(max_examples=100, deadline=None)
@given(draw=st.randoms(use_true_random=False), thinking=st.booleans(), drop=st.booleans())
def test_every_turn_of_a_conversation_equals_a_fresh_encoding(tokenizer, draw, thinking, drop):
    tools = [tool["function"] for tool in random_conversations.tools(draw)]
    messages = random_conversations.messages(draw)
    for end in range(1, len(messages) + 1):
        turn = [{key: value for key, value in message.items() if key != "prefix"} for message in messages[:end]]
        segments = render(parse_messages(turn), thinking, tools=tools, drop_thinking=drop)
        assert tokenizer.encode_segments(segments) == fresh_ids(tokenizer, segments)


def test_the_next_turn_encodes_only_what_is_new(tokenizer, monkeypatch):
    encoded = []
    fresh = tokenizer._texts._encode
    monkeypatch.setattr(tokenizer._texts, "_encode", lambda text: encoded.append(text) or fresh(text))
    turns = [{"role": "system", "content": "You are the test of a memory."}]
    for number in range(4):
        turns.append({"role": "user", "content": f"question {number}"})
        tokenizer.encode_segments(render(parse_messages(turns), False))
        turns.append({"role": "assistant", "content": f"answer {number}"})
    questions = [f"question {number}" for number in range(4)]
    answers = [f"answer {number}" for number in range(3)]
    assert sorted(encoded) == sorted([turns[0]["content"], *questions, *answers])


@given(asked=st.lists(st.sampled_from("abcdefgh"), max_size=60), room=st.integers(0, 4))
def test_the_least_recently_used_text_is_forgotten_first(asked, room):
    encoded, recent = [], []
    texts = EncodedTexts(lambda text: encoded.append(text) or [ord(text)], room * SIZE)
    for text in asked:
        expected = text not in recent
        encoded.clear()
        assert list(texts.ids(text)) == [ord(text)]
        assert bool(encoded) == expected
        recent = [other for other in recent if other != text] + [text]
        recent = recent[len(recent) - room :] if len(recent) > room else recent
        assert texts.num_bytes == len(recent) * SIZE


def test_a_text_larger_than_the_memory_is_encoded_and_displaces_nothing():
    texts = EncodedTexts(lambda text: range(len(text)), 1000)
    texts.ids("kept")
    before = texts.num_bytes
    assert list(texts.ids("a" * 5000)) == list(range(5000))
    assert texts.num_bytes == before > 0


def test_a_text_that_cannot_be_encoded_leaves_nothing(tokenizer):
    before = tokenizer._texts.num_bytes
    with pytest.raises(InvalidRequest):
        tokenizer.encode_segments(["\ud800"])
    assert tokenizer._texts.num_bytes == before


def test_threads_share_it():
    texts = EncodedTexts(lambda text: [len(text)] * 3, 40 * SIZE)
    with ThreadPoolExecutor(4) as pool:
        wanted = ["x" * (1 + number * 7 % 50) for number in range(4000)]
        assert [list(ids) for ids in pool.map(texts.ids, wanted)] == [[len(text)] * 3 for text in wanted]
    assert texts.num_bytes == sum(sys.getsizeof(t) + sys.getsizeof(i) for t, i in texts._known.items())
    assert texts.num_bytes <= 40 * SIZE
