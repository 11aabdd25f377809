"""What becomes of output that leaves the grammar. D stands for the DSML token, END for </think>."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4serve.chat.detokenizer import StopMatcher
from dsv4serve.chat.grammar import Grammar
from dsv4serve.chat.render import OutputStart
from dsv4serve.chat.reply import Reply
from dsv4serve.chat.tokenizer import ControlToken

MARKERS = {"{D}": ControlToken.DSML, "{END}": ControlToken.END_THINK}
OPEN, CLOSE = "<{D}tool_calls>\n", "</{D}tool_calls>"
CALL, END_CALL = '<{D}invoke name="f">\n', "</{D}invoke>\n"
TOOLS = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}}}]


def parameter(name, value, string="true"):
    return f'<{{D}}parameter name="{name}" string="{string}">{value}</{{D}}parameter>\n'


def block(*parts):
    return "\n\n" + OPEN + CALL + "".join(parts) + END_CALL + CLOSE


def parse(template, start=OutputStart.CONTENT, is_cut=False, by_character=False, tools=TOOLS):
    grammar = Grammar(start, tools, StopMatcher([]))
    reply = Reply()
    pieces = [template]
    for spelling in MARKERS:
        pieces = [part for piece in pieces for part in split(piece, spelling)]
    for piece in pieces:
        if piece in MARKERS:
            grammar.marker(MARKERS[piece])
        else:
            for text in piece if by_character else [piece]:
                grammar.text(text)
    grammar.finish(is_cut)
    reply.add(grammar.delta)
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in reply.tool_calls]
    return reply.reasoning, reply.content, calls, dict(grammar.malformed)


def split(text, spelling):
    first, *others = text.split(spelling)
    return [first, *(part for other in others for part in (spelling, other))]


PA = parameter("a", "x")
WHOLE = ("f", '{"a": "x"}')


@pytest.mark.parametrize(
    ("template", "calls", "kinds"),
    [
        (block(PA), [WHOLE], {}),
        (block(parameter("a", "x"), parameter("b", "[1, 2]", "false")), [("f", '{"a": "x", "b": [1, 2]}')], {}),
        (CALL + PA + END_CALL, [WHOLE], {"wrapper_missing": 1, "calls_not_closed": 1}),
        ("<{D}function_calls>" + CALL + PA + END_CALL + "</{D}function_calls>", [WHOLE], {"wrapper_misspelt": 1}),
        (OPEN + CALL + PA + END_CALL, [WHOLE], {"calls_not_closed": 1}),
        (OPEN + CALL + PA, [WHOLE], {"call_not_closed": 1}),
        (OPEN + CALL + PA + CLOSE, [WHOLE], {"call_not_closed": 1}),
        (OPEN + CALL + PA + CALL + PA + END_CALL + CLOSE, [WHOLE, WHOLE], {"call_not_closed": 1}),
        (OPEN + CALL, [("f", "")], {"call_not_closed": 1}),
        (block(parameter('he said "a"', "x")), [("f", '{"he said \\"a\\"": "x"}')], {}),
        (block(parameter("back\\slash", "x")), [("f", '{"back\\\\slash": "x"}')], {}),
        (block(parameter("a>b c", "x")), [("f", '{"a>b c": "x"}')], {}),
        (block(parameter("a", "Paris", "false")), [("f", '{"a": "Paris"}')], {"value_is_no_json": 1}),
        (block(parameter("a", "NaN", "false")), [("f", '{"a": "NaN"}')], {"value_is_no_json": 1}),
        (block(parameter("a", '{"k": "1\n2"}', "false")), [("f", '{"a": {"k": "1\\n2"}}')], {"value_is_no_json": 1}),
        (block('<{D}parameter name="a">5</{D}parameter>'), [("f", '{"a": 5}')], {"parameter_type_missing": 1}),
        (block("<{D}parameter NAME = 'a'  String='TRUE' >5</{D}parameter>"), [("f", '{"a": "5"}')], {}),
        (block('<{D}parameter string="true" name="a">x</{D}parameter>'), [WHOLE], {}),
        (block('{"a": "x"}\n'), [WHOLE], {"json_body": 1}),
        (block("no arguments"), [("f", "{}")], {"json_body": 1}),
        (OPEN + '<{D}invoke name="f"/>\n' + CLOSE, [("f", "{}")], {}),
        (block(PA, parameter("a", "y")), [WHOLE], {"duplicate_parameter": 1}),
        (
            block('<{D}parameter name="a" string="true">x', parameter("b", "y")),
            [("f", '{"a": "x", "b": "y"}')],
            {"value_not_closed": 1},
        ),
        (block('<{D}parameter name="a" string="true">x'), [WHOLE], {"value_not_closed": 1}),
        (block('<{D}parameter name="a" string="true">x</{D}param>'), [WHOLE], {"value_not_closed": 1}),
        (OPEN + CALL + '<{D}parameter name="a" string="true">x' + CLOSE, [WHOLE], None),
        (OPEN + CALL + '<{D}parameter name="a" string="true">rm -rf /tm', [("f", '{"a": "rm -rf /tm')], None),
        (OPEN + CALL + PA + '<{D}parameter name="b" string="false">[1,', [("f", '{"a": "x", "b": [1,')], None),
        (block(parameter("a", "1{D}2{END}3<{D}x>4<{D}\n<</")), [("f", None)], {}),
        (block(parameter("arguments", '{"a": "x"}', "false")), [WHOLE], {"wrapped_arguments": 1}),
        (block(parameter("input", '{"a": "x"}')), [WHOLE], {"wrapped_arguments": 1}),
        (block(parameter("input", '{"c": 1}', "false")), [("f", '{"input": {"c": 1}}')], {}),
        (block(parameter("input", "text")), [("f", '{"input": "text"}')], {}),
        (block(parameter("input", "{}", "false"), PA), [("f", '{"input": {}, "a": "x"}')], {}),
        (block(PA) + "\nDone! " + block(PA), [WHOLE], {}),
    ],
)
def test_calls_are_repaired_and_counted(template, calls, kinds):
    for by_character in (False, True):
        _, content, got, malformed = parse("Hi." + template, by_character=by_character)
        assert content == "Hi."
        if calls == [("f", None)]:
            (call,) = got
            assert json.loads(call[1]) == {"a": "1\uff5cDSML\uff5c2</think>3<\uff5cDSML\uff5cx>4<\uff5cDSML\uff5c\n<</"}
        else:
            assert got == calls
        if kinds is not None:
            assert malformed == kinds


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("a\n\n" + OPEN + CLOSE + "b", "a\n\nb"),
        ("a\n\n" + OPEN + "b", "a\n\nb"),
        ("a" + OPEN + PA + CLOSE + "\nb", "ax\nb"),
        ("a</{D}invoke> b", "a b"),
        ("a\n</{D}tool_calls>\nb", "a\n\nb"),
        ("a {D} b", "a  b"),
        ("a <{D} 1 b\nc", "a  1 b\nc"),
        ("a < b </ c\n\n", "a < b </ c\n\n"),
        ("a\n<{D}tool_ca", "a"),
        ("a{END}\nb", "a\nb"),
        ("<think>a", "<think>a"),
    ],
)
def test_content_keeps_its_text_and_loses_markup(template, content):
    for by_character in (False, True):
        assert parse(template, by_character=by_character)[1:3] == (content, [])


def test_a_call_ends_reasoning_and_reasoning_without_end_is_counted():
    start = OutputStart.REASONING
    assert parse("Hm.\n" + block(PA), start)[:3] == ("Hm.", "", [WHOLE])
    assert parse("Hm.", start) == ("Hm.", "", [], {"reasoning_not_closed": 1})
    assert parse("Hm. " + OPEN + "so" + CLOSE + " then{END}b", start)[:3] == ("Hm. so then", "b", [])


def test_a_call_cut_by_the_length_limit_stays_open():
    assert parse(OPEN + CALL + PA, is_cut=True)[2] == [("f", '{"a": "x"')]
    assert parse(block(PA), is_cut=True)[2] == [WHOLE]


def test_continuations_keep_leading_newlines_of_the_continued_part():
    assert parse("\nr{END}\nc", OutputStart.REASONING_CONTINUATION)[:2] == ("\nr", "c")
    assert parse("\nc", OutputStart.CONTENT_CONTINUATION)[:2] == ("", "\nc")


def test_a_string_value_streams_and_another_waits_until_it_is_whole():
    grammar = Grammar(OutputStart.TOOL_CALLS, [], StopMatcher([]))
    pieces = ["<", "{D}", 'invoke name="f">', "<", "{D}", 'parameter name="a" string="true">', "x", "y<", "z"]
    pieces += ["</", "{D}", "parameter>", "<", "{D}", 'parameter name="b" string="false">', "1", "2", "</", "{D}"]
    pieces += ["parameter>"]
    seen = []
    for piece in pieces:
        grammar.marker(MARKERS[piece]) if piece in MARKERS else grammar.text(piece)
        seen.append("".join(call.arguments for call in grammar.delta.calls))
    assert seen[6:9] == ['{"a": "x', '{"a": "xy', '{"a": "xy<z']
    assert seen[17:] == ['{"a": "xy<z"', '{"a": "xy<z"', '{"a": "xy<z", "b": 12']
    first = grammar.delta.calls[0]
    assert (first.index, first.name, first.arguments) == (0, "f", "")
    assert first.id.startswith("call_")
    assert len(first.id) == len("call_") + 24
    assert {(call.id, call.name) for call in grammar.delta.calls[1:]} == {(None, None)}


def test_without_tools_nothing_is_parsed():
    text = "a\n\n" + OPEN + CALL
    assert parse(text, tools=None)[1:3] == (text.replace("{D}", ControlToken.DSML), [])


PIECES = [
    "{D}",
    "{END}",
    "<",
    "</",
    "<{D}",
    "</{D}",
    ">",
    "\n",
    "\n\n",
    "/",
    '"',
    "tool_calls>",
    "x",
    " ",
    "12",
    "{",
    "}",
]
PIECES += [
    OPEN,
    CLOSE,
    CALL,
    END_CALL,
    PA,
    '<{D}parameter name="b" string="false">',
    "parameter>",
    "invoke>",
    'name="a"',
]


@settings(max_examples=1500, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=16),
    start=st.sampled_from(list(OutputStart)),
    is_cut=st.booleans(),
    tools=st.sampled_from([[], TOOLS]),
)
def test_any_output_gives_the_same_in_any_grouping_and_never_leaks(pieces, start, is_cut, tools):
    template = "".join(pieces)
    whole = parse(template, start, is_cut, tools=tools)
    assert parse(template, start, is_cut, by_character=True, tools=tools) == whole
    reasoning, content, calls, _ = whole
    assert "DSML" not in reasoning + content
    for name, _ in calls:
        assert name == "f"
