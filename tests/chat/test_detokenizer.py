from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4serve.chat.detokenizer import Detokenizer, StopMatcher
from dsv4serve.chat.output import OutputParser
from dsv4serve.chat.render import OutputStart
from dsv4serve.chat.tokenizer import ControlToken

IDS = st.lists(st.one_of(st.integers(0, 400), st.integers(0, 129279), st.integers(129280, 140000)), max_size=40)
SLOW = settings(max_examples=200, deadline=None)


def pieces_of(tokenizer, ids, skip=True):
    detokenizer = Detokenizer(tokenizer, skip)
    return [*map(detokenizer.feed, ids), detokenizer.flush()]


@SLOW
@given(ids=IDS, skip=st.booleans())
def test_pieces_join_to_the_whole_decode(tokenizer, ids, skip):
    known = [i for i in ids if i in tokenizer.token_bytes]
    whole = tokenizer._full.decode(known, skip_special_tokens=skip)
    assert "".join(pieces_of(tokenizer, ids, skip)) == whole
    assert tokenizer.decode(ids, skip) == whole


@SLOW
@given(text=st.text(max_size=30))
def test_no_piece_ends_inside_a_character(tokenizer, text):
    shown = ""
    for piece in pieces_of(tokenizer, tokenizer.encode_segments([text])):
        shown += piece
        assert text.startswith(shown)
    assert shown == text


def test_a_character_of_several_tokens_comes_out_whole(tokenizer):
    ids = tokenizer.encode_segments(["🜂"])
    assert len(ids) > 1
    pieces = pieces_of(tokenizer, ids)
    assert pieces == [*[""] * (len(ids) - 1), "🜂", ""]
    assert pieces_of(tokenizer, ids[:-1])[-1] == "\ufffd"


def cut_by_definition(text, stops, include):
    """The stop string that ends first, the longest of those: by trying every end."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[:end] if include else text[: end - len(stop)], stop
    return text, None


AB = st.text("ab", min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(pieces=st.lists(st.text("abc", max_size=4), max_size=10), stops=st.lists(AB, max_size=3), include=st.booleans())
def test_stop_strings_are_found_in_any_chunking_and_only_possible_starts_are_held(pieces, stops, include):
    matcher = StopMatcher(stops, include)
    shown, fed = "", ""
    for piece in pieces:
        fed += piece
        shown += matcher.feed(piece)
        if matcher.stopped_by is None:
            held = fed[len(shown) :]
            assert fed == shown + held
            assert held == max(
                (stop[:n] for stop in stops for n in range(len(stop)) if fed.endswith(stop[:n])), key=len, default=""
            )
    assert (shown + matcher.flush(), matcher.stopped_by) == cut_by_definition(fed, stops, include)


def parse(tokenizer, ids, splits, **options):
    """Reasoning, content and counts when `ids` come in the groups that `splits` cut."""
    parser = OutputParser(tokenizer, **options)
    reasoning = content = ""
    bounds = [0, *sorted(splits), len(ids)]
    for start, end in pairwise(bounds):
        delta = parser.feed(ids[start:end])
        reasoning, content = reasoning + delta.reasoning, content + delta.content
    delta = parser.finish()
    counts = (parser.num_tokens, parser.num_reasoning_tokens, parser.stopped_by)
    return reasoning + delta.reasoning, content + delta.content, counts


WORDS = st.lists(st.sampled_from(["\n", "\n\n", "a", " b", "</think>", "<think>", "é", "STOP", "ST", "🜂"]), max_size=12)


@SLOW
@given(words=WORDS, data=st.data(), stops=st.sampled_from([[], ["STOP"], ["\na", "a b"]]))
def test_grouping_of_ids_changes_nothing(tokenizer, words, data, stops):
    ids = tokenizer.encode("".join(words))
    options = {"stops": stops}
    splits = data.draw(st.lists(st.integers(0, len(ids)), max_size=6))
    for thinking in (True, False):
        whole = parse(tokenizer, ids, [], start=OutputStart.REASONING if thinking else OutputStart.CONTENT, **options)
        assert (
            parse(tokenizer, ids, splits, start=OutputStart.REASONING if thinking else OutputStart.CONTENT, **options)
            == whole
        )
        assert (
            parse(
                tokenizer,
                ids,
                range(len(ids)),
                start=OutputStart.REASONING if thinking else OutputStart.CONTENT,
                **options,
            )
            == whole
        )


@SLOW
@given(words=WORDS)
def test_the_split_equals_its_definition(tokenizer, words):
    ids = tokenizer.encode("".join(words))
    end = tokenizer.control_ids[ControlToken.END_THINK]
    got = parse(tokenizer, ids, [], start=OutputStart.REASONING)[:2]
    if end in ids:
        at = ids.index(end)
        before, after = tokenizer.decode(ids[:at]), tokenizer.decode([i for i in ids[at:] if i != end])
        assert got == (before.strip("\n"), after.lstrip("\n"))
    else:
        assert got == (tokenizer.decode(ids).lstrip("\n"), "")


def test_spelled_markers_are_text(tokenizer):
    ids = tokenizer.encode_segments(["a</think>b"])
    assert parse(tokenizer, ids, [], start=OutputStart.REASONING)[:2] == ("a</think>b", "")


def test_stop_strings_do_not_apply_to_reasoning(tokenizer):
    ids = tokenizer.encode("one STOP two</think>three STOP four")
    reasoning, content, counts = parse(tokenizer, ids, [], start=OutputStart.REASONING, stops=["STOP"])
    assert (reasoning, content) == ("one STOP two", "three ")
    assert counts[2] == "STOP"
    assert counts[0] == len(tokenizer.encode("one STOP two</think>three STOP"))


def test_a_raw_completion_is_not_trimmed(tokenizer):
    ids = tokenizer.encode("\n\na</think>\n")
    assert parse(tokenizer, ids, [], start=None)[1] == "\n\na</think>\n"


def test_skip_special_tokens(tokenizer):
    ids = [*tokenizer.encode("a"), 1, *tokenizer.encode("b")]
    assert parse(tokenizer, ids, [], start=None)[1] == "ab"
    assert parse(tokenizer, ids, [], start=None, skip_special_tokens=False)[1] == f"a{ControlToken.EOS}b"
