"""How an answer shows its reasoning: apart, apart but in one piece, inside of the content, or not at all."""

from __future__ import annotations

from enum import Enum, auto

from dsv4serve.chat.render import OutputStart
from dsv4serve.chat.reply import Delta
from dsv4serve.chat.tokenizer import ControlToken


class Form(Enum):
    """What a request can ask for."""

    APART = auto()
    IN_ONE_PIECE = auto()  # when it has ended; the rest is streamed as ever
    IN_CONTENT = auto()  # <think>reasoning</think>answer
    HIDDEN = auto()  # it is generated, and counted


class ShownReasoning:
    """Rewrites the deltas of one choice. `start` is where its prompt left the model."""

    def __init__(self, form: Form, start: OutputStart | None) -> None:
        self._form = form
        self._is_open = start in (OutputStart.REASONING, OutputStart.REASONING_CONTINUATION)
        # A continuation goes on behind a tag that the client has.
        self._head = ControlToken.THINK.value if start is OutputStart.REASONING else ""
        self._held = ""

    def rewrite(self, delta: Delta, is_open: bool, is_last: bool) -> Delta:
        """The next delta; `is_open` while reasoning may come behind it. It stays open if the output was cut in it."""
        if self._form is Form.APART or not self._is_open:
            return delta
        is_open = is_open and not (delta.content or delta.calls)
        if self._form is Form.HIDDEN:
            delta.reasoning = ""
        elif self._form is Form.IN_ONE_PIECE:
            self._held += delta.reasoning
            delta.reasoning = "" if is_open and not is_last else self._held
        else:
            tail = "" if is_open else ControlToken.END_THINK.value
            delta.content = self._head + delta.reasoning + tail + delta.content
            delta.reasoning = self._head = ""
        self._is_open = is_open
        return delta
