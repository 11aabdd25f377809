"""The tokens of a choice as the API shows them: log probabilities in the forms of chat and of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dsv4serve.chat.detokenizer import Detokenizer
from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.types import TokenLogprobs


class Token(NamedTuple):
    """One token of an output or of an echoed prompt."""

    id: int
    logprobs: TokenLogprobs | None  # None where not asked for, and for the first token of a prompt
    is_prompt: bool = False


def chat_logprobs(tokenizer: ChatTokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """One entry per generated token, those of reasoning, calls and the end included."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes.get(token_id, b"")
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    content = []
    for token in tokens:
        if token.logprobs is not None:
            top = zip(token.logprobs.top_ids, token.logprobs.top_logprobs, strict=True)
            best = [entry(token_id, logprob) for token_id, logprob in top]
            content.append(entry(token.id, token.logprobs.logprob) | {"top_logprobs": best})
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The lists of one choice, which may come in pieces: `text_offset` counts characters of the choice's text."""

    def __init__(self, tokenizer: ChatTokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self._offset = 0

    def take(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The lists for the next tokens."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.feed(token.id))
        return {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [token.logprobs and token.logprobs.logprob for token in tokens],
            "top_logprobs": [token.logprobs and self._top(token.id, token.logprobs) for token in tokens],
            "text_offset": offsets,
        }

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes.get(token_id, b"").decode("utf-8", "replace")

    def _top(self, token_id: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """The best tokens and the one that stands there. Of several with the same text the best counts."""
        top: dict[str, float] = {}
        for best, logprob in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True):
            top.setdefault(self._text(best), logprob)
        top.setdefault(self._text(token_id), logprobs.logprob)
        return top
