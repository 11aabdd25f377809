"""Splits an assistant's output into reasoning and content, text piece by text piece."""

from __future__ import annotations


class ReasoningSplitter:
    """The plain part of the output grammar: reasoning END_THINK content.

    Leading newlines of both parts and newlines right before END_THINK are dropped; trailing newlines of content
    stay. A second END_THINK is deleted by the caller not passing it on: `end_think` has no effect in content.
    """

    def __init__(self, in_reasoning: bool) -> None:
        """`in_reasoning`: the prompt ended in THINK."""
        self.in_reasoning = in_reasoning
        self._at_start = True
        self._held = ""  # newlines of the reasoning that END_THINK would swallow

    def feed(self, text: str) -> str:
        """The part of `text` that can be shown now; it belongs to the part that `in_reasoning` names."""
        if self._at_start:
            text = text.lstrip("\n")
            if not text:
                return ""
            self._at_start = False
        if not self.in_reasoning:
            return text
        text = self._held + text
        shown = text.rstrip("\n")
        self._held = text[len(shown) :]
        return shown

    def end_think(self) -> None:
        """The id of END_THINK was sampled."""
        if self.in_reasoning:
            self.in_reasoning = False
            self._at_start = True
            self._held = ""

    def flush(self) -> str:
        """The reasoning's trailing newlines, when the output ended without END_THINK."""
        held, self._held = self._held, ""
        return held
