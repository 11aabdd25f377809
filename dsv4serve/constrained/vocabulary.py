"""The vocabulary as a grammar sees it: the bytes behind each id.

Control tokens have none, so no grammar allows them, except the end of the sequence and the marker of calls. A parser
of calls counts a marker only when its id was sampled (docs/model.md), so a grammar must ask for the id: the marker
stands for a character of its own that nothing else can spell.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsv4serve.chat.tokenizer import ChatTokenizer, ControlToken
from dsv4serve.types import CheckpointError

# U+10FFFE is no character. Byte F4 begins only characters of the last private plane, which nobody writes; ids with it
# are left out, so that only the marker itself has it.
MARKER = "\U0010fffe"
MARKER_LEAD = MARKER.encode()[0]


@dataclass(frozen=True)
class Vocabulary:
    """`token_bytes[i]` are the bytes of id i, empty for ids that no grammar allows."""

    token_bytes: list[bytes]
    eos_token_id: int
    marker_id: int


def no_vocabulary() -> Vocabulary:
    """Raises CheckpointError, for models that were loaded without a tokenizer."""
    raise CheckpointError("this engine has no tokenizer, so no output can be constrained")


def read_vocabulary(directory: Path, vocab_size: int) -> Vocabulary:
    """The vocabulary of `directory`/tokenizer.json, as long as a row of logits. Raises CheckpointError."""
    tokenizer = ChatTokenizer(directory)
    token_bytes = [b""] * vocab_size
    for token_id, text in tokenizer.token_bytes.items():
        if token_id < vocab_size and token_id not in tokenizer.added_ids and MARKER_LEAD not in text:
            token_bytes[token_id] = text
    ids = tokenizer.control_ids
    token_bytes[ids[ControlToken.DSML]] = MARKER.encode()
    return Vocabulary(token_bytes, ids[ControlToken.EOS], ids[ControlToken.DSML])
