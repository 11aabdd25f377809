"""One choice's output: sampled ids in, what to show out. Joins detokeniser, reasoning splitter and stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsv4serve.chat.detokenizer import Detokenizer, StopMatcher
from dsv4serve.chat.reasoning import ReasoningSplitter
from dsv4serve.chat.tokenizer import ChatTokenizer, ControlToken


@dataclass(slots=True)
class Delta:
    """Text to add to a choice. Reasoning comes before content."""

    reasoning: str = ""
    content: str = ""


class OutputParser:
    """Text of one choice, the same for any grouping of its ids. Stop strings apply to content only."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        splitter: ReasoningSplitter | None,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """`splitter` None is a raw completion: every id is content and nothing is trimmed."""
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self._splitter = splitter
        self._matcher = StopMatcher(stops, include_stop)
        self._end_think = tokenizer.control_ids[ControlToken.END_THINK]
        self.num_tokens = 0
        self.num_reasoning_tokens = 0

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the content."""
        return self._matcher.stopped_by

    def feed(self, token_ids: Iterable[int], silent_id: int | None = None) -> Delta:
        """Take new ids up to the one that completes a stop string. `silent_id`, the id that ended the sequence when
        it is not to be shown, counts but adds no text."""
        delta = Delta()
        splitter = self._splitter
        for token_id in token_ids:
            if self.stopped_by is not None:
                break
            self.num_tokens += 1
            if token_id == silent_id:
                continue
            if splitter is None:
                self._add(self._detokenizer.feed(token_id), delta)
            elif token_id == self._end_think:
                self._add(self._detokenizer.flush(), delta)
                splitter.end_think()
            else:
                self.num_reasoning_tokens += splitter.in_reasoning
                self._add(self._detokenizer.feed(token_id), delta)
        return delta

    def finish(self) -> Delta:
        """What was held back. Call once, when no more ids come."""
        delta = Delta()
        if self.stopped_by is not None:
            return delta
        self._add(self._detokenizer.flush(), delta)
        if self._splitter is not None:
            delta.reasoning += self._splitter.flush()
        if self.stopped_by is None:
            delta.content += self._matcher.flush()
        return delta

    def _add(self, text: str, delta: Delta) -> None:
        if not text:
            return
        splitter = self._splitter
        if splitter is None:
            delta.content += self._matcher.feed(text)
        elif splitter.in_reasoning:
            delta.reasoning += splitter.feed(text)
        else:
            delta.content += self._matcher.feed(splitter.feed(text))
