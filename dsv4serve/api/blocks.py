"""A message as a row of blocks (reasoning, text, calls), for the APIs whose streams open and close each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from dsv4serve.chat.reply import CallDelta, Delta


class What(Enum):
    """What happens to a block."""

    OPEN = "open"
    ADD = "add"
    CLOSE = "close"


@dataclass(slots=True)
class Block:
    """One block. `call` names the function of a call, whose text is its arguments as JSON."""

    index: int
    kind: str  # reasoning, text or call
    call: CallDelta | None = None
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.pieces)


class Step(NamedTuple):
    """One thing that happens; `text` is what an ADD adds."""

    what: What
    block: Block
    text: str = ""


class Blocks:
    """Deltas in, steps out. At most the last block is open."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: Block | None = None

    def feed(self, delta: Delta) -> Iterator[Step]:
        """What `delta` does."""
        for kind, text in (("reasoning", delta.reasoning), ("text", delta.content)):
            if text:
                if self._open is None or self._open.kind != kind:
                    yield from self._begin(kind, None)
                yield self._add(text)
        for call in delta.calls:
            if call.id is not None:
                yield from self._begin("call", call)
            if call.arguments:
                yield self._add(call.arguments)

    def close(self) -> Iterator[Step]:
        """The end of the block that is open."""
        if self._open is not None:
            yield Step(What.CLOSE, self._open)
            self._open = None

    def _begin(self, kind: str, call: CallDelta | None) -> Iterator[Step]:
        yield from self.close()
        self._open = Block(len(self.blocks), kind, call)
        self.blocks.append(self._open)
        yield Step(What.OPEN, self._open)

    def _add(self, text: str) -> Step:
        assert self._open is not None
        self._open.pieces.append(text)
        return Step(What.ADD, self._open, text)
