"""Ids -> text while they arrive, and the search for stop strings in that text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from dsv4serve.chat.tokenizer import ChatTokenizer


class Detokenizer:
    """Incremental decode of one sequence.

    The pieces joined equal ChatTokenizer.decode of all ids; a piece never ends inside a UTF-8 character.
    """

    def __init__(self, tokenizer: ChatTokenizer, skip_special_tokens: bool = True) -> None:
        self._bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._bytes.get(token_id, b""))

    def flush(self) -> str:
        """What is left at the end of the text: U+FFFD for an incomplete character, else nothing."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class StopMatcher:
    """Finds the stop string that ends first (of those ending together, the longest), for any chunking of the text.

    Keeps for each stop string the length of its longest prefix that the text so far ends in (Knuth, Morris,
    Pratt 1977), so the work per character does not grow with the length of the strings, and exactly the text that may
    still become a stop string is held back.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`include` keeps the matched string at the end of the text."""
        self._stops = [(stop, _fallbacks(stop)) for stop in stops]
        self._include = include
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.is_armed = True  # while False text passes unread; set it before any text is held
        self.stopped_by: str | None = None

    def feed(self, text: str) -> str:
        """The text that can be shown now. After a match `stopped_by` is set and nothing more comes out."""
        if not self._stops or not self.is_armed:
            return text
        if self.stopped_by is not None:
            return ""
        buffer = self._held + text
        for position in range(len(self._held), len(buffer)):
            self._step(buffer[position])
            if self.stopped_by is not None:
                self._held = ""
                end = position + 1
                return buffer[:end] if self._include else buffer[: end - len(self.stopped_by)]
        cut = len(buffer) - max(self._matched)
        self._held = buffer[cut:]
        return buffer[:cut]

    def flush(self) -> str:
        """The text held back, once it is clear that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> None:
        for index, (stop, fallbacks) in enumerate(self._stops):
            length = self._matched[index]
            while length and stop[length] != character:
                length = fallbacks[length - 1]
            if stop[length] == character:
                length += 1
            self._matched[index] = length
            if length == len(stop) and (self.stopped_by is None or length > len(self.stopped_by)):
                self.stopped_by = stop


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop` the length of its longest proper prefix that is also its suffix."""
    lengths = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = lengths[length - 1]
        if stop[index] == stop[length]:
            length += 1
        lengths[index] = length
    return lengths
