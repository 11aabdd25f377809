"""An assistant message while it is generated: what to add to it, and the sum."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(slots=True)
class CallDelta:
    """Text to add to the arguments of a call. The first one of a call also has its id and name."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Delta:
    """What to add to a message, in this order."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def extend(self, other: Delta) -> None:
        """Add what comes right after."""
        self.reasoning += other.reasoning
        self.content += other.content
        self.calls += other.calls


@dataclass(slots=True)
class Reply:
    """Deltas put together: the message."""

    _reasoning: list[str] = field(default_factory=list)
    _content: list[str] = field(default_factory=list)
    _calls: list[tuple[CallDelta, list[str]]] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """The next delta."""
        self._reasoning.append(delta.reasoning)
        self._content.append(delta.content)
        for call in delta.calls:
            if call.index == len(self._calls):
                self._calls.append((call, []))
            self._calls[call.index][1].append(call.arguments)

    def as_delta(self) -> Delta:
        """The whole message as one delta."""
        calls = [replace(first, arguments="".join(pieces)) for first, pieces in self._calls]
        return Delta(self.reasoning, self.content, calls)

    @property
    def reasoning(self) -> str:
        """The thinking."""
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        """The answer."""
        return "".join(self._content)

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls, as the API has them."""
        return [
            {"id": first.id, "type": "function", "function": {"name": first.name, "arguments": "".join(pieces)}}
            for first, pieces in self._calls
        ]
