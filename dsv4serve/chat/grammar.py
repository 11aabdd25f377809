"""The output grammar of DeepSeek-V4: text and markers in the order of generation -> reasoning, content and calls.

    reasoning END_THINK text "\\n\\n" <D tool_calls> (<D invoke name="N"> (<D parameter name="K" string="B"> value
    </D parameter>)* </D invoke>)+ </D tool_calls>                                                          D = DSML

What a model writes is often not quite this. Any opening tag starts the calls, what can be understood is repaired and
counted in `malformed`, and markup never ends up in content.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from dsv4serve.chat.arguments import Arguments
from dsv4serve.chat.detokenizer import StopMatcher
from dsv4serve.chat.render import OutputStart
from dsv4serve.chat.reply import CallDelta, Delta
from dsv4serve.chat.tags import Tag, TagReader
from dsv4serve.chat.tokenizer import ControlToken
from dsv4serve.chat.tools import Tool

DSML = ControlToken.DSML.value
BRACKET = re.compile(r"</?\Z")


class State(Enum):
    """Where in the grammar the output is."""

    REASONING = auto()
    CONTENT = auto()
    TAG = auto()  # behind a DSML marker
    BLOCK = auto()  # between calls
    CALL = auto()  # between parameters
    VALUE = auto()
    DONE = auto()  # behind the calls: whatever follows is dropped


class Grammar:
    """One message. What `text`, `marker` and `finish` find goes to `delta`, which the caller takes and replaces.

    The result does not depend on how the text is cut into pieces. Only what the next marker may swallow is held back:
    newlines, and the angle bracket of a tag.
    """

    def __init__(self, start: OutputStart, tools: Sequence[Tool] | None, stops: StopMatcher) -> None:
        """`tools` None: the request has none, and DSML is text. `stops` sees content only."""
        reasoning = start in (OutputStart.REASONING, OutputStart.REASONING_CONTINUATION)
        self.state = State.REASONING if reasoning else State.CONTENT
        self.delta = Delta()
        self.malformed: Counter[str] = Counter()
        self.num_calls = 0
        self._stops = stops
        self._properties = {tool["name"]: _properties(tool) for tool in tools or ()}
        self._has_calls = tools is not None
        self._at_start = start in (OutputStart.REASONING, OutputStart.CONTENT)  # leading newlines are dropped
        self._held = ""
        self._outside = self.state  # where the calls began: REASONING or CONTENT
        self._gap = ""  # newlines before the calls, shown only if there turns out to be no call
        self._before_tag = self.state
        self._tag = TagReader(False)
        self._body: list[str] = []  # text between calls, or between parameters
        self._arguments = Arguments(None, self.malformed)
        if start is OutputStart.TOOL_CALLS:
            self.state, self._outside = State.BLOCK, State.CONTENT

    @property
    def may_reason(self) -> bool:
        """Whether more reasoning may come."""
        state = self._before_tag if self.state is State.TAG else self.state
        return not self.num_calls and (self._outside if state is State.BLOCK else state) is State.REASONING

    def text(self, text: str) -> None:
        """More text."""
        while text:
            if self.state is State.TAG:
                text = self._read_tag(text)
                continue
            if self.state is State.VALUE:
                self._value(text)
            elif self.state in (State.BLOCK, State.CALL):
                self._body.append(text)
            elif self.state is not State.DONE:
                self._plain(text)
            return

    def marker(self, token: ControlToken) -> None:
        """END_THINK or DSML was generated as the token itself, not spelled."""
        if self.state is State.DONE:
            return
        if self.state is State.TAG:  # the tag before never ended
            self._use_tag(self._tag.broken())
            self.marker(token)
        elif token is ControlToken.END_THINK:
            self._end_think()
        elif self._has_calls:
            self._start_tag()
        else:
            self.text(token.value)

    def finish(self, is_cut: bool) -> None:
        """No more comes: `is_cut` when the length limit ended the output and not the model itself."""
        if self.state is State.TAG:
            self._finish_tag()
        if self.state is State.VALUE:
            self.malformed["cut_in_value"] += 1
            self._add(self._arguments.text(self._take_held()) + self._arguments.cut())
        elif self.state is State.CALL:
            self.malformed["call_not_closed"] += 1
            body = self._take_body()
            is_whole = not is_cut and not self._arguments.is_empty
            self._add(self._arguments.end(body) if is_whole else self._arguments.rest(body))
        elif self.state is State.BLOCK:
            if self.num_calls:
                self.malformed["calls_not_closed"] += 1
            else:
                self._leave_empty_block()
        if self.state is State.REASONING:
            self.malformed["reasoning_not_closed"] += 1
        if self.state in (State.REASONING, State.CONTENT):
            self._show(self._take_held())

    # Reasoning and content

    def _plain(self, text: str) -> None:
        if self._at_start:
            text = text.lstrip("\n")
            if not text:
                return
            self._at_start = False
        text = self._held + text
        cut = len(text)
        if self._has_calls and (bracket := BRACKET.search(text, cut - 2)):
            cut = bracket.start()
        if self._has_calls or self.state is State.REASONING:  # else nothing can swallow newlines
            cut = len(text[:cut].rstrip("\n"))
        self._held = text[cut:]
        self._show(text[:cut])

    def _show(self, text: str) -> None:
        if self.state is State.REASONING:
            self.delta.reasoning += text
        elif text:
            self.delta.content += self._stops.feed(text)

    def _end_think(self) -> None:
        if self.state is State.BLOCK and self._outside is State.REASONING and not self.num_calls:
            self._leave_empty_block()
        if self.state is State.REASONING:
            held = self._take_held()
            self._show("" if held.strip("\n") == "" else held)
            self.state, self._at_start = State.CONTENT, True
        elif self.state is State.VALUE:
            self._value(ControlToken.END_THINK.value)

    # Tags

    def _start_tag(self) -> None:
        is_plain = self.state in (State.REASONING, State.CONTENT)
        text = self._take_held() if is_plain or self.state is State.VALUE else self._take_body()
        bracket = "</" if text.endswith("</") else "<" if text.endswith("<") else ""
        text = text[: len(text) - len(bracket)]
        if is_plain and not bracket:
            self.malformed["stray_marker"] += 1
            self._held = text
            return
        if self.state is State.VALUE:
            self._add(self._arguments.text(text))
            if not bracket:  # the token alone is part of the value
                self._value(DSML)
                return
        elif is_plain:
            kept = text.rstrip("\n")
            self._show(kept)
            self._gap = text[len(kept) :]
        else:
            self._body.append(text)
        self._before_tag, self.state = self.state, State.TAG
        self._tag = TagReader(bracket == "</")

    def _read_tag(self, text: str) -> str:
        """Feed the open tag; the text behind it when it ended."""
        for position, character in enumerate(text):
            tag = self._tag.feed(character)
            if tag is not None:
                self._use_tag(tag)
                return text[position + 1 :]
        return ""

    def _use_tag(self, tag: Tag) -> None:
        """Go on behind `tag`, from the state in front of it."""
        self.state = self._before_tag
        if self.state in (State.REASONING, State.CONTENT):
            self._use_tag_outside(tag)
        elif self.state is State.VALUE:
            self._use_tag_in_value(tag)
        elif tag.kind == "broken":
            self.malformed["broken_tag"] += 1
            self._body.append(tag.text)
        elif tag.is_closing:
            self._close(tag)
        elif tag.kind == "invoke":
            if self.state is State.CALL:
                self.malformed["call_not_closed"] += 1
                self._end_call()
            self._start_call(tag)
        elif tag.kind == "parameter" and self.state is State.CALL:
            self._add(self._arguments.open(tag.name, tag.is_text))
            if tag.is_text is None:
                self.malformed["parameter_type_missing"] += 1
            self.state = State.VALUE
        else:  # a parameter outside of any call, or one more wrapper
            self.malformed["stray_tag"] += 1

    def _use_tag_outside(self, tag: Tag) -> None:
        if tag.is_closing or tag.kind == "broken":
            self.malformed["stray_tag" if tag.is_closing else "broken_tag"] += 1
            gap, self._gap = self._gap, ""
            self.text(gap + tag.text if tag.kind == "broken" else gap)
            return
        if self.state is State.REASONING:
            self.malformed["call_in_reasoning"] += 1
        self._outside, self.state = self.state, State.BLOCK
        if tag.kind != "wrapper":
            self.malformed["wrapper_missing"] += 1
            self._before_tag = State.BLOCK
            self._use_tag(tag)
        elif tag.text.strip() != "tool_calls":
            self.malformed["wrapper_misspelt"] += 1

    def _use_tag_in_value(self, tag: Tag) -> None:
        if tag.kind in ("broken", "wrapper") and not tag.is_closing:  # belongs to the value
            self._value(f"<{DSML}{tag.text}{'' if tag.kind == 'broken' else '>'}")
            return
        self._add(self._arguments.close())
        self.state = self._before_tag = State.CALL
        if tag.is_closing and tag.text.strip() == "parameter":
            return
        self.malformed["value_not_closed"] += 1
        if not tag.is_closing or tag.kind == "invoke" or tag.text.strip() == "tool_calls":
            self._use_tag(tag)

    def _close(self, tag: Tag) -> None:
        """A closing tag in BLOCK or CALL."""
        if tag.kind == "parameter":
            self.malformed["stray_tag"] += 1
            return
        if self.state is State.CALL:
            self._end_call()
            if tag.kind == "invoke":
                return
            self.malformed["call_not_closed"] += 1
        elif tag.kind == "invoke":
            self.malformed["stray_tag"] += 1
            return
        if self.num_calls:
            self.state = State.DONE
        else:
            self._leave_empty_block()

    def _finish_tag(self) -> None:
        """The output ended inside a tag, which is dropped: it may be the start of anything."""
        self.malformed["cut_in_tag"] += 1
        self.state = self._before_tag
        self._gap = ""

    # Calls

    def _start_call(self, tag: Tag) -> None:
        self._body.clear()
        self._arguments = Arguments(self._properties.get(tag.name), self.malformed)
        self.delta.calls.append(CallDelta(self.num_calls, "", f"call_{secrets.token_hex(12)}", tag.name))
        self.num_calls += 1
        self.state = State.CALL
        if tag.is_empty:
            self._end_call()

    def _end_call(self) -> None:
        self._add(self._arguments.end(self._take_body()))
        self.state = State.BLOCK

    def _leave_empty_block(self) -> None:
        """Calls were announced and none came: the markup is dropped, the text in it kept."""
        self.malformed["no_call"] += 1
        self.state = self._outside
        gap, self._gap = self._gap, ""
        self.text(gap + self._take_body().strip("\n"))

    def _value(self, text: str) -> None:
        text = self._held + text
        bracket = BRACKET.search(text, len(text) - 2)
        cut = bracket.start() if bracket else len(text)
        self._held = text[cut:]
        self._add(self._arguments.text(text[:cut]))

    def _add(self, arguments: str) -> None:
        if arguments:
            self.delta.calls.append(CallDelta(self.num_calls - 1, arguments))

    def _take_held(self) -> str:
        held, self._held = self._held, ""
        return held

    def _take_body(self) -> str:
        body = "".join(self._body)
        self._body.clear()
        return body


def _properties(tool: Tool) -> dict[str, Any] | None:
    parameters = tool.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else None
