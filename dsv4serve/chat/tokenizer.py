"""Text to ids and back, with the control tokens kept apart from what a client can write.

DeepSeek-V4's control tokens stand in the same vocabulary as text, so a naive encode of a rendered prompt
turns a user's typed "<｜Assistant｜>" into the real one. `encode_segments` therefore takes control tokens as
values of their own and encodes everything else with a copy of the tokenizer that has no added tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

from dsv4serve.chat.encoded_texts import EncodedTexts
from dsv4serve.types import CheckpointError, InvalidRequest

MAX_FILE_BYTES = 256 << 20  # the official tokenizer.json has 6 MB
MAX_KNOWN_BYTES = 64 << 20  # texts of earlier prompts and their ids: some million tokens


class ControlToken(StrEnum):
    """The control tokens that chat needs; their ids are looked up by this content, never assumed."""

    BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    FIM_BEGIN = "<\uff5cfim\u2581begin\uff5c>"
    FIM_HOLE = "<\uff5cfim\u2581hole\uff5c>"
    FIM_END = "<\uff5cfim\u2581end\uff5c>"
    USER = "<\uff5cUser\uff5c>"
    ASSISTANT = "<\uff5cAssistant\uff5c>"
    THINK = "<think>"
    END_THINK = "</think>"
    DSML = "\uff5cDSML\uff5c"
    LATEST_REMINDER = "<\uff5clatest_reminder\uff5c>"
    ACTION = "<\uff5caction\uff5c>"
    QUERY = "<\uff5cquery\uff5c>"
    AUTHORITY = "<\uff5cauthority\uff5c>"
    DOMAIN = "<\uff5cdomain\uff5c>"
    TITLE = "<\uff5ctitle\uff5c>"
    EXTRACTED_URL = "<\uff5cextracted_url\uff5c>"
    READ_URL = "<\uff5cread_url\uff5c>"


Segment = str | ControlToken  # a ControlToken is a str too: test for it first


class ChatTokenizer:
    """tokenizer.json of a checkpoint, in its two readings: with and without the added tokens."""

    def __init__(self, directory: Path) -> None:
        """Load `directory`/tokenizer.json. Raises CheckpointError naming what is missing or unsupported."""
        path = directory / "tokenizer.json"
        raw = _read(path)
        self._full = _build(raw, path)
        plain = _build({**raw, "added_tokens": []}, path)
        self._texts = EncodedTexts(lambda text: _encode(plain, text), MAX_KNOWN_BYTES)
        added = self._full.get_added_tokens_decoder()
        by_content = {token.content: token_id for token_id, token in added.items()}
        missing = [token.value for token in ControlToken if token.value not in by_content]
        if missing:
            raise CheckpointError(f"{path}: added_tokens lack {', '.join(map(repr, missing))}; chat needs them")
        self.control_ids = {token: by_content[token.value] for token in ControlToken}
        self.added_ids = frozenset(added)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.token_bytes = _token_bytes(self._full, {token_id: token.content for token_id, token in added.items()})
        self.max_token_bytes = max(map(len, self.token_bytes.values()))

    def encode(self, text: str) -> list[int]:
        """Ids of `text` in the full vocabulary: control tokens written in it become control ids. No BOS is added."""
        return _encode(self._full, text)

    def encode_segments(self, segments: Iterable[Segment]) -> list[int]:
        """Ids of a rendered prompt. Neighbouring texts are encoded as one run; no text can become a control id.

        Runs do not influence each other, so those of earlier prompts (the turns before, the same tools) are remembered.
        """
        ids: list[int] = []
        for run in join_texts(segments):
            if isinstance(run, ControlToken):
                ids.append(self.control_ids[run])
            else:
                ids.extend(self._texts.ids(run))
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary become nothing."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        known = self.token_bytes
        return b"".join(known.get(i, b"") for i in ids if i not in skipped).decode("utf-8", "replace")

    def min_tokens(self, text: str) -> int:
        """A lower bound of len(encode(text)), without encoding: no token is longer than max_token_bytes."""
        return -(-len(text.encode("utf-8", "replace")) // self.max_token_bytes)


def join_texts(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The same prompt with neighbouring texts joined and empty ones left out."""
    run: list[str] = []
    for segment in segments:
        if not isinstance(segment, ControlToken):
            run.append(segment)
            continue
        if text := "".join(run):
            yield text
        run.clear()
        yield segment
    if text := "".join(run):
        yield text


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_FILE_BYTES} bytes; not a tokenizer.json")
        raw = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; a checkpoint folder needs tokenizer.json") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    decoder = raw.get("decoder") if isinstance(raw, dict) else None
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise CheckpointError(f"{path}: decoder is {decoder!r}; DeepSeek-V4 tokenizers are byte-level BPE (ByteLevel)")
    return dict(raw)


def _build(raw: dict[str, Any], path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(orjson.dumps(raw).decode())
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{path}: not a usable tokenizer: {error}") from None


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:  # no offsets: making and freeing them would hold the interpreter for a tenth of a second in a million bytes
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    except (TypeError, UnicodeEncodeError):
        raise InvalidRequest("the text has unpaired surrogates; it must be valid Unicode") from None
    return ids


def _token_bytes(tokenizer: Tokenizer, added: dict[int, str]) -> dict[int, bytes]:
    """The bytes behind every id. Byte-level BPE writes byte b as a printable character (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}
    table = {
        token_id: text.translate(alphabet).encode("latin-1")
        for text, token_id in tokenizer.get_vocab(with_added_tokens=False).items()
        if token_id not in added
    }
    return table | {token_id: content.encode() for token_id, content in added.items()}
