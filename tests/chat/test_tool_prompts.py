import pytest

from dsv4serve.chat.effort import TEXTS, detect_contract, effort_tier, resolve_contract
from dsv4serve.chat.messages import Message, parse_messages
from dsv4serve.chat.render import OutputStart, output_start, render
from dsv4serve.chat.tokenizer import ControlToken
from dsv4serve.chat.tools import ToolCall, calls_block, parse_tools, response_format_text, tools_block
from dsv4serve.config import EffortContract
from dsv4serve.types import InvalidRequest

D = ControlToken.DSML
PREVIEW, SINCE_0731 = EffortContract.PREVIEW, EffortContract.SINCE_0731


def tool(**function):
    return {"type": "function", "function": {"name": "f", **function}}


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"not": value}
    return value


def test_a_definition_keeps_the_keys_of_the_client_in_order_and_drops_what_is_not_for_the_model():
    raw = {"parameters": {"type": "object", "x": None}, "strict": True, "name": "f", "description": None, "größe": 1}
    (parsed,) = parse_tools([{"type": "function", "function": raw | {"defer_loading": True}}])
    line = '{"parameters": {"type": "object", "x": null}, "name": "f", "größe": 1}'
    assert f"\n\n{line}\n\n" in "".join(tools_block([parsed]))


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ("x", "tools"),
        ([1], "tools.0"),
        ([{"type": "web_search"}], "tools.0.type"),
        ([{"type": "function"}], "tools.0.function"),
        ([tool(name=None)], "tools.0.function.name"),
        ([tool(name='a"b')], "tools.0.function.name"),
        ([tool(name="a b")], "tools.0.function.name"),
        ([tool(name="")], "tools.0.function.name"),
        ([tool(), tool()], "tools.1.function.name"),
        ([tool(description=1)], "tools.0.function.description"),
        ([tool(parameters=[])], "tools.0.function.parameters"),
        ([tool(parameters={"type": "strin"})], "tools.0.function.parameters.type"),
        ([tool(parameters={"properties": {"a": {"enum": 1}}})], "tools.0.function.parameters.properties.a.enum"),
        ([tool(parameters={"$schema": "http://[x"})], "tools.0.function.parameters.$schema"),
        ([tool(parameters={"$schema": 5})], "tools.0.function.parameters.$schema"),
        ([tool(parameters={"$schema": ["x"]})], "tools.0.function.parameters.$schema"),
        ([tool(parameters=nested(900))], "tools.0.function.parameters"),
        ([tool(x=nested(100_000))], "tools.0.function"),
    ],
)
def test_a_wrong_tool_is_named(raw, param):
    with pytest.raises(InvalidRequest) as caught:
        parse_tools(raw)
    assert caught.value.param == param


def test_arguments_as_python_writes_them():
    text = '{"n": 1e5, "big": 123456789012345678901234567890, "s": "a\\n\\"b\\" <", "o": {"ü": [1, null]}}'
    block = "".join(calls_block([ToolCall("", "f", text)]))
    assert f'<{D}parameter name="n" string="false">100000.0</{D}parameter>\n' in block
    assert f'<{D}parameter name="big" string="false">123456789012345678901234567890</{D}parameter>\n' in block
    assert f'<{D}parameter name="s" string="true">a\n"b" <</{D}parameter>\n' in block
    assert f'<{D}parameter name="o" string="false">{{"ü": [1, null]}}</{D}parameter>\n</{D}invoke>' in block


@pytest.mark.parametrize("text", ["", "not json", "[1]", '"x"', "null", "[" * 100_000, "9" * 5000])
def test_arguments_that_are_no_object_become_one_string(text):
    block = "".join(calls_block([ToolCall("", "f", text)]))
    assert f'<{D}parameter name="arguments" string="true">{text}</{D}parameter>' in block


def test_calls_without_a_function_around_them_and_arguments_as_an_object():
    raw = [{"name": "f", "arguments": {"a": 1}}, {"id": "x", "function": {"name": "g", "arguments": "{}"}}]
    (message,) = parse_messages([{"role": "assistant", "tool_calls": raw}])
    assert message.tool_calls == (ToolCall("", "f", '{"a": 1}'), ToolCall("x", "g", "{}"))


def text_of(messages, thinking=False, **options):
    return "".join(render(messages, thinking, **options))


def test_results_take_the_order_of_their_calls_and_the_slots_of_results():
    calls = tuple(ToolCall(i, "f", "{}") for i in "ab")
    head = [Message("user", "q"), Message("assistant", "", tool_calls=calls)]
    turn = [
        Message("tool", "B", tool_call_id="b"),
        Message("user", "u"),
        Message("tool", "A", tool_call_id="a"),
        Message("tool", "?"),
    ]
    results = [f"<tool_result>{text}</tool_result>" for text in "A?B"]
    expected = f"{ControlToken.USER}{results[0]}\n\nu\n\n{results[1]}\n\n{results[2]}{ControlToken.ASSISTANT}"
    assert expected in text_of(head + turn)


def test_parts_of_a_result_that_are_no_text_are_named():
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    (message,) = parse_messages([{"role": "tool", "content": parts}])
    assert message.content == "a\n\n[Unsupported image_url]"


def test_tools_of_messages_and_of_the_request_are_merged_by_name():
    message = Message("system", "s", tools=({"name": "f", "x": 1}, {"name": "g"}))
    block = text_of([message], tools=[{"name": "f", "x": 2}, {"name": "h"}])
    assert '{"name": "f", "x": 2}\n{"name": "g"}\n{"name": "h"}\n' in block


def test_developer_turns_before_the_last_user_turn_are_dropped_with_the_reasoning():
    turns = [Message("developer", "d"), Message("assistant", "a", "r"), Message("user", "u")]
    assert text_of(turns, True).startswith(f"{ControlToken.BOS}{ControlToken.ASSISTANT}</think>a")
    assert f"{ControlToken.USER}d{ControlToken.ASSISTANT}<think>r</think>a" in text_of(turns, True, drop_thinking=False)
    assert f"{ControlToken.USER}d{ControlToken.ASSISTANT}</think>a" in text_of(turns, False)


def test_the_answer_to_a_task_has_no_header():
    turns = [Message("user", "u", task="query"), Message("assistant", "a")]
    assert f"{ControlToken.USER}u{ControlToken.QUERY}a{ControlToken.EOS}" in text_of(turns, True)
    assert output_start(turns[:1], True) is OutputStart.CONTENT
    with pytest.raises(InvalidRequest, match="task"):
        parse_messages([{"role": "user", "content": "u", "task": "query"}, {"role": "user", "content": "v"}])


def test_only_a_read_url_task_makes_a_control_token_of_text():
    content = f"x{ControlToken.EXTRACTED_URL}http://a"
    segments = render([Message("user", content, task="read_url")], False)
    assert [s for s in segments if isinstance(s, ControlToken)][2:] == [
        ControlToken.EXTRACTED_URL,
        ControlToken.READ_URL,
    ]
    segments = render([Message("user", content)], False)
    assert ControlToken.EXTRACTED_URL not in [s for s in segments if isinstance(s, ControlToken)]


@pytest.mark.parametrize(
    ("reasoning", "content", "thinking", "end", "start"),
    [
        ("r", "", True, "<think>r", OutputStart.REASONING_CONTINUATION),
        ("r", "c", True, "<think>r</think>c", OutputStart.CONTENT_CONTINUATION),
        ("", "c", True, "<think></think>c", OutputStart.CONTENT_CONTINUATION),
        ("r", "c", False, "</think>c", OutputStart.CONTENT_CONTINUATION),
    ],
)
def test_a_prefix_is_continued_where_it_ends(reasoning, content, thinking, end, start):
    messages = [Message("user", "u"), Message("assistant", content, reasoning, prefix=True)]
    assert text_of(messages, thinking).endswith(f"u{ControlToken.ASSISTANT}{end}")
    assert output_start(messages, thinking) is start


@pytest.mark.parametrize(
    "raw", [5, {}, {"type": "regex"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}}]
)
def test_a_wrong_response_format_is_refused(raw):
    with pytest.raises(InvalidRequest) as caught:
        response_format_text(raw)
    assert caught.value.param.startswith("response_format")


def test_effort_tiers_of_both_contracts():
    values = [None, "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]
    assert [effort_tier(v, PREVIEW) for v in values] == ["high"] * 5 + ["max"] * 3
    assert [effort_tier(v, SINCE_0731) for v in values] == ["high", "low", "low", "high", "high", "high", "max", "max"]
    assert TEXTS[PREVIEW]["max"] == TEXTS[SINCE_0731]["high"] != TEXTS[SINCE_0731]["max"]
    assert TEXTS[PREVIEW]["high"] == TEXTS[SINCE_0731]["low"] == ""


@pytest.mark.parametrize(
    ("source", "contract"),
    [
        ("REASONING_EFFORT_MAX = 'x'\n", PREVIEW),
        ("REASONING_EFFORT_PROMPTS = {}\nREASONING_EFFORT_MAX = 'x'\nraise SystemExit\n", SINCE_0731),
        ("pass\n", None),
        (None, None),
    ],
)
def test_the_contract_is_read_from_the_encoder_without_running_it(tmp_path, source, contract):
    if source is not None:
        (tmp_path / "encoding").mkdir()
        (tmp_path / "encoding" / "encoding_dsv4.py").write_text(source)
    assert detect_contract(tmp_path) is contract
    assert resolve_contract(EffortContract.AUTO, tmp_path) is (contract or PREVIEW)
    assert resolve_contract(SINCE_0731, tmp_path) is SINCE_0731
