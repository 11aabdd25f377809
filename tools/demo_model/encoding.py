"""Samples -> token ids, through the same encoder that serves requests."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dsv4serve.chat.messages import parse_messages
from dsv4serve.chat.render import render
from dsv4serve.chat.tokenizer import ChatTokenizer, ControlToken
from dsv4serve.chat.tools import parse_tools
from tools.demo_model.sample import Sample


class Document(NamedTuple):
    """Ids of one document; `learnt` holds its category where the token is to be predicted, else 0."""

    ids: list[int]
    learnt: list[int]
    is_text: bool  # may be cut


class SampleEncoder:
    """Renders and tokenises samples with a checkpoint's tokenizer."""

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = ChatTokenizer(tokenizer)
        control = self._tokenizer.control_ids
        self._bos, self._eos = control[ControlToken.BOS], control[ControlToken.EOS]
        self._assistant = control[ControlToken.ASSISTANT]

    def encode(self, sample: Sample, category: int) -> Document:
        """One document: BOS text EOS, or a rendered chat up to the EOS of its last answer."""
        if sample.text is not None:
            ids = [self._bos, *self._tokenizer.encode_segments([sample.text]), self._eos]
            return Document(ids, [0] + [category] * (len(ids) - 1), True)
        messages = parse_messages(sample.messages)
        segments = render(messages, sample.thinking, tools=parse_tools(sample.tools), effort=sample.effort)
        ids = self._tokenizer.encode_segments(segments[:-2])  # without the header of one more answer
        drops_reasoning = sample.thinking and not sample.tools
        return Document(ids, self._answers(ids, category, only_last=drops_reasoning), False)

    def _answers(self, ids: list[int], category: int, only_last: bool) -> list[int]:
        """What the model writes: from after `<Assistant><think>` or `<Assistant></think>` to EOS. `only_last` where
        earlier answers are rendered without their reasoning."""
        learnt = [0] * len(ids)
        starts = [i for i, token in enumerate(ids) if token == self._assistant]
        for start in starts[-1:] if only_last else starts:
            for i in range(start + 2, len(ids)):
                learnt[i] = category
                if ids[i] == self._eos:
                    break
        return learnt
