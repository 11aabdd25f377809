import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4serve.chat.messages import parse_messages
from dsv4serve.chat.render import render, resolve_thinking
from dsv4serve.chat.tokenizer import ControlToken, join_texts
from dsv4serve.types import InvalidRequest

B, E, U, A = ControlToken.BOS, ControlToken.EOS, ControlToken.USER, ControlToken.ASSISTANT
T, N, D, R = ControlToken.THINK, ControlToken.END_THINK, ControlToken.DSML, ControlToken.LATEST_REMINDER


def text_of(raw, thinking=False, drop=True):
    return "".join(render(parse_messages(raw), thinking, drop_thinking=drop))


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def test_system_messages_are_hoisted_and_joined():
    raw = [{"role": "system", "content": "a"}, user("x"), {"role": "developer", "content": "b"}, user("y")]
    assert text_of(raw) == f"{B}a\n\nb{U}x\n\ny{A}{N}"


def test_a_conversation_that_ends_with_system_still_asks_for_an_answer():
    assert text_of([user("x"), {"role": "system", "content": "s"}]) == f"{B}s{U}x{A}{N}"


def test_a_trailing_assistant_message_gets_a_new_header_and_keeps_its_reasoning():
    raw = [user("x"), assistant("y", reasoning="r")]
    assert text_of(raw, thinking=True) == f"{B}{U}x{A}{T}r{N}y{E}{A}{T}"
    assert text_of(raw, thinking=False) == f"{B}{U}x{A}{N}y{E}{A}{N}"


def test_assistant_first_and_assistant_after_assistant_have_headers():
    raw = [assistant("a"), assistant(None), user("x")]
    assert text_of(raw) == f"{B}{A}{N}a{E}{A}{N}{E}{U}x{A}{N}"


def test_a_kept_turn_without_reasoning_has_an_empty_block():
    assert text_of([user("x"), assistant("a"), user("y")], True, drop=False) == f"{B}{U}x{A}{T}{N}a{E}{U}y{A}{T}"


def test_text_parts_are_joined_by_a_blank_line():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert text_of([user(parts)]) == text_of([user("a\n\nb")])


def test_reasoning_content_wins_over_reasoning():
    (message,) = parse_messages([assistant("a", reasoning="vllm", reasoning_content="deepseek")])
    assert message.reasoning == "deepseek"


def test_an_answer_can_be_sent_back_as_the_openai_client_dumps_it():
    raw = assistant("a", refusal=None, annotations=None, audio=None, function_call=None, tool_calls=None)
    assert text_of([raw]) == text_of([assistant("a")])


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "function", "content": "x"}, "messages.1.role"),
        ({"role": "alien", "content": "x"}, "messages.1.role"),
        ({"role": ["user"], "content": "x"}, "messages.1.role"),
        ({"content": "x"}, "messages.1.role"),
        ("x", "messages.1"),
        (None, "messages.1"),
        ({"role": "user"}, "messages.1.content"),
        ({"role": "user", "content": 1}, "messages.1.content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.1.content.0.type"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages.1.content.0.text"),
        ({"role": "user", "content": ["x"]}, "messages.1.content.0"),
        ({"role": "assistant", "content": "x", "reasoning": 1}, "messages.1.reasoning"),
        ({"role": "user", "content": "x", "prefix": True}, "messages.1.prefix"),
        ({"role": "assistant", "content": "x", "prefix": 1}, "messages.1.prefix"),
        ({"role": "user", "content": "x", "task": "title"}, "messages.1.task"),
        ({"role": "assistant", "content": "x", "task": "query"}, "messages.1.task"),
        ({"role": "developer", "content": "x", "task": "query"}, "messages.1.task"),
        ({"role": "user", "content": "x", "tools": [{}]}, "messages.1.tools"),
        ({"role": "system", "content": "x", "tools": [{}]}, "messages.1.tools.0.function"),
        ({"role": "user", "content": "x", "tool_calls": [{"id": "a"}]}, "messages.1.tool_calls"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "messages.1.tool_calls"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "messages.1.tool_calls.0.name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": 'a"b'}}]}, "messages.1.tool_calls.0.function.name"),
        ({"role": "assistant", "tool_calls": [{"id": 1, "name": "f"}]}, "messages.1.tool_calls.0.id"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": 1}]}, "messages.1.tool_calls.0.arguments"),
        ({"role": "tool", "content": "x", "tool_call_id": 1}, "messages.1.tool_call_id"),
        ({"role": "tool", "content": [1]}, "messages.1.content.0"),
    ],
)
def test_a_wrong_message_is_named(message, param):
    with pytest.raises(InvalidRequest) as caught:
        parse_messages([user("x"), message])
    assert caught.value.param == param


def test_no_messages_is_an_error():
    with pytest.raises(InvalidRequest) as caught:
        parse_messages([])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"enable_thinking": False, "reasoning_effort": "high"}, False),
        ({"thinking": True, "enable_thinking": False}, True),
        ({"thinking_type": "disabled", "thinking": True, "reasoning_effort": "max"}, False),
        ({"thinking_type": "enabled", "thinking": False, "reasoning_effort": "none"}, True),
    ],
)
def test_thinking_switch_precedence(switches, expected):
    assert resolve_thinking(**switches) is expected


SPELLINGS = st.sampled_from([*(token.value for token in ControlToken), "<", "｜", "User", "｜>", "\n", " "])
TEXTS = st.lists(st.one_of(SPELLINGS, st.text(max_size=8)), max_size=6).map("".join)
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": TEXTS}),
        st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXTS, "reasoning_content": TEXTS}),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(raw=MESSAGES, thinking=st.booleans(), drop=st.booleans())
def test_what_a_client_writes_never_becomes_a_control_token(tokenizer, raw, thinking, drop):
    segments = render(parse_messages(raw), thinking, drop_thinking=drop)
    ids = tokenizer.encode_segments(segments)
    controls = [tokenizer.control_ids[s] for s in segments if isinstance(s, ControlToken)]
    added = set(tokenizer._full.get_added_tokens_decoder())
    assert [i for i in ids if i in added] == controls
    assert tokenizer.decode(ids) == "".join(segments)


def test_neighbouring_texts_are_one_run():
    assert list(join_texts(["a", "", "b", U, "", A, "c", "d"])) == ["ab", U, A, "cd"]


def test_unpaired_surrogates_are_refused(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_segments([text])):
        with pytest.raises(InvalidRequest, match="surrogate"):
            encode("a\ud800b")
