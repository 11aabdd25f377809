"""Reasoning apart, in one piece, inside of the content, or hidden: the same message in any grouping of its tokens."""

import pytest

from dsv4serve.chat.output import OutputParser
from dsv4serve.chat.render import OutputStart
from dsv4serve.chat.reply import Delta, Reply
from dsv4serve.chat.shown_reasoning import Form, ShownReasoning
from dsv4serve.chat.tokenizer import ControlToken

D = ControlToken.DSML.value
CALL = f'<{D}tool_calls>\n<{D}invoke name="f">\n</{D}invoke>\n</{D}tool_calls>'
NO_CALL = f"<{D}tool_calls>\n</{D}tool_calls>"
# What the model wrote -> reasoning, the inline form, content, number of calls.
TEXTS = {
    "Why?\n\n</think>\n\nSo.": ("Why?", "<think>Why?</think>So.", "So.", 0),
    "</think>So.": ("", "<think></think>So.", "So.", 0),
    "Why?</think>": ("Why?", "<think>Why?</think>", "", 0),
    "Why": ("Why", "<think>Why", "", 0),
    f"Why?</think>Wait.\n\n{CALL}": ("Why?", "<think>Why?</think>Wait.", "Wait.", 1),
    f"Why?</think>{CALL}": ("Why?", "<think>Why?</think>", "", 1),
    f"Why?\n\n{CALL}": ("Why?", "<think>Why?</think>", "", 1),
    f"Why?\n\n{NO_CALL} Oh</think>So.": ("Why?\n\n Oh", "<think>Why?\n\n Oh</think>So.", "So.", 0),
}


def deltas(tokenizer, text, form, start, group):
    parser = OutputParser(tokenizer, start=start, tools=[])
    shown = ShownReasoning(form, start)
    ids = tokenizer.encode(text)
    for first in range(0, len(ids), group):
        delta = parser.feed(ids[first : first + group])
        is_last = first + group >= len(ids)
        if is_last:
            delta.extend(parser.finish())
        yield shown.rewrite(delta, parser.may_reason, is_last)


@pytest.mark.parametrize("group", [1, 2, 3, 1000])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("form", list(Form))
def test_every_form(tokenizer, text, form, group):
    reasoning, inline, content, num_calls = TEXTS[text]
    reply, pieces = Reply(), []
    for delta in deltas(tokenizer, text, form, OutputStart.REASONING, group):
        reply.add(delta)
        pieces += [delta.reasoning] if delta.reasoning else []
    assert len(reply.tool_calls) == num_calls
    if form is Form.IN_CONTENT:
        assert (reply.reasoning, reply.content) == ("", inline)
    else:
        assert (reply.reasoning, reply.content) == ("" if form is Form.HIDDEN else reasoning, content)
    if form is Form.IN_ONE_PIECE:
        assert len(pieces) == bool(reasoning)


def test_a_continuation_of_reasoning_has_its_tag_already(tokenizer):
    found = deltas(tokenizer, "more</think>So.", Form.IN_CONTENT, OutputStart.REASONING_CONTINUATION, 1)
    assert "".join(delta.content for delta in found) == "more</think>So."


@pytest.mark.parametrize("start", [OutputStart.CONTENT, OutputStart.CONTENT_CONTINUATION, None])
@pytest.mark.parametrize("form", list(Form))
def test_what_was_not_thought_is_not_marked(start, form):
    assert ShownReasoning(form, start).rewrite(Delta(content="So."), False, False) == Delta(content="So.")
