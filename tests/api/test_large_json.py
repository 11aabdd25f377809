"""JSON in pieces gives what orjson gives, for right and for wrong texts, and no call of orjson is large."""

import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4serve.api import large_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('a"\\[]{},:é ', max_size=9),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text('a"\\[{,:', max_size=3), inner, max_size=5),
    max_leaves=40,
)
SPACES = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t: ")])


def outcome(read, raw):
    try:
        return read(raw), None
    except ValueError:  # orjson's error is one
        return None, "no JSON"


@settings(max_examples=1500, deadline=None)
@given(value=VALUES, spaces=SPACES, piece=st.integers(1, 60), data=st.data())
def test_pieces_give_what_the_whole_gives(value, spaces, piece, data):
    raw = json.dumps(value, separators=spaces, ensure_ascii=data.draw(st.booleans())).encode()
    expected = orjson.loads(raw)
    assert large_json.loads(raw, piece) == expected
    if isinstance(expected, dict):
        assert list(large_json.loads(raw, piece)) == list(expected)
    # One change anywhere: a character less, another one, one more.
    at = data.draw(st.integers(0, len(raw) - 1))
    with_other = data.draw(st.sampled_from([b"", b",", b"[", b"]", b"{", b"}", b'"', b"\\", b":", b" ", b"1", b"\xff"]))
    for wrong in (raw[:at] + with_other + raw[at + 1 :], raw[:at] + with_other + raw[at:]):
        assert outcome(lambda text: large_json.loads(text, piece), wrong) == outcome(orjson.loads, wrong), wrong


@pytest.mark.parametrize("piece", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b" ", b"[", b"]", b"[1,", b"[,1]", b"[1,,2]", b"[1,]", b"[1 [2]]", b"[[1] 2]", b"[[1],]", b"[1}"),
        *(b'{"a" [1]}', b'{"a":[1],}', b"{[1]:2}", b'{"a":[1]}{', b'{"a":1]', b'["a]', b'["\\"]', b"x[1]", b"[[1]x]"),
        *(b"[1] [2]", b'{"a":1,[2]}', b"{:[1]}", b"[" * 2000 + b"]" * 2000),
    ],
)
def test_what_is_no_json_is_refused(raw, piece):
    assert outcome(lambda text: large_json.loads(text, piece), raw) == (None, "no JSON")


@pytest.mark.parametrize("key", ["a", "b"])
def test_the_last_of_equal_keys_wins(key):
    raw = b'{"a":[1,2,3],"b":0,"%s":[4,5,6]}' % key.encode()
    assert large_json.loads(raw, 3) == orjson.loads(raw)


def test_no_call_of_the_parser_gets_more_than_a_piece(monkeypatch):
    sizes = []
    parse = orjson.loads

    def watched(raw):
        sizes.append(len(raw))
        return parse(raw)

    texts = [
        parse(b"[" + b",".join([b'[{}, [1, 2], "x,y"]'] * 20_000) + b"]"),
        {"prompt": [12345] * 100_000},
        {"messages": [{"role": "user", "content": "x" * 20}] * 5000, "tools": [[[[[1] * 30_000]]]]},
    ]
    monkeypatch.setattr(large_json.orjson, "loads", watched)
    for value in texts:
        sizes.clear()
        assert large_json.loads(orjson.dumps(value)) == value
        assert len(sizes) > 2
        assert max(sizes) < 2 * large_json.PIECE_BYTES


def test_too_many_values_are_refused(monkeypatch):
    monkeypatch.setattr(large_json, "MAX_VALUES", 100)
    assert large_json.loads(b"[" + b",".join([b"1"] * 100) + b"]") == [1] * 100
    with pytest.raises(ValueError, match="more than 100 values"):
        large_json.loads(b"[" + b",".join([b"1"] * 101) + b"]")
