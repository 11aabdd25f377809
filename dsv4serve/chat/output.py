"""One choice's output: sampled ids in, what to show out. Joins detokeniser, output grammar and stop strings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from dsv4serve.chat.detokenizer import Detokenizer, StopMatcher
from dsv4serve.chat.grammar import Grammar, State
from dsv4serve.chat.render import OutputStart
from dsv4serve.chat.reply import Delta
from dsv4serve.chat.tokenizer import ChatTokenizer, ControlToken
from dsv4serve.chat.tools import Tool


class OutputParser:
    """Text of one choice, the same for any grouping of its ids. Stop strings apply to content only."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        start: OutputStart | None,
        tools: Sequence[Tool] | None = None,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        """`start` None is a raw completion: every id is content and nothing is trimmed. `tools` None looks for no
        calls; an empty list looks for calls of functions that are not known. Stop strings count in what comes
        after the first `min_tokens` tokens."""
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self._matcher = StopMatcher(stops, include_stop)
        self._grammar = None if start is None else Grammar(start, tools, self._matcher)
        self._markers = {tokenizer.control_ids[token]: token for token in (ControlToken.END_THINK, ControlToken.DSML)}
        self._min_tokens = min_tokens
        self.num_tokens = 0
        self.num_reasoning_tokens = 0

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the content."""
        return self._matcher.stopped_by

    @property
    def has_calls(self) -> bool:
        """Whether a tool call was found."""
        return self._grammar is not None and self._grammar.num_calls > 0

    @property
    def is_done(self) -> bool:
        """Whether nothing that comes can change the message: a stop string was found or the calls are closed."""
        return self.stopped_by is not None or (self._grammar is not None and self._grammar.state is State.DONE)

    @property
    def may_reason(self) -> bool:
        """Whether more reasoning may come."""
        return self._grammar is not None and self._grammar.may_reason

    @property
    def malformed(self) -> Counter[str]:
        """How often the output left the grammar, by kind."""
        return Counter() if self._grammar is None else self._grammar.malformed

    def feed(self, token_ids: Iterable[int], silent_id: int | None = None) -> Delta:
        """Take new ids up to the one at which the output `is_done`. `silent_id`, the id that ended the sequence when
        it is not to be shown, counts but adds no text."""
        delta = Delta()
        grammar = self._grammar
        if grammar is not None:
            grammar.delta = delta
        for token_id in token_ids:
            if self.is_done:
                break
            self.num_tokens += 1
            self._matcher.is_armed = self.num_tokens > self._min_tokens
            if token_id == silent_id:
                continue
            if grammar is None:
                delta.content += self._matcher.feed(self._detokenizer.feed(token_id))
                continue
            marker = self._markers.get(token_id)
            if marker is not ControlToken.END_THINK:
                self.num_reasoning_tokens += grammar.state is State.REASONING
            if marker is None:
                grammar.text(self._detokenizer.feed(token_id))
            else:
                grammar.text(self._detokenizer.flush())
                grammar.marker(marker)
        return delta

    def finish(self, is_cut: bool = False) -> Delta:
        """What was held back. Call once, when no more ids come; `is_cut` when the length limit ended them."""
        delta = Delta()
        if self.stopped_by is not None:
            return delta
        rest = self._detokenizer.flush()
        if self._grammar is None:
            delta.content += self._matcher.feed(rest)
        else:
            self._grammar.delta = delta
            self._grammar.text(rest)
            self._grammar.finish(is_cut)
        if self.stopped_by is None:
            delta.content += self._matcher.flush()
        return delta
