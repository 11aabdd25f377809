"""The parameters of one call, as they are generated -> the JSON text of its arguments, in pieces."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsv4serve.chat.tools import to_json

WRAPPERS = ("arguments", "input")  # names that a model puts around all of its arguments, wrongly


class Arguments:
    """Writes one JSON object. The pieces that its methods return, joined, are the text.

    Strings are written while they come. Other values are held until they are complete, because text that is no JSON
    must become a string. A parameter that comes again is dropped: the first one counts.
    """

    def __init__(self, properties: Mapping[str, Any] | None, malformed: Counter[str]) -> None:
        """`properties`: what the tool's schema declares, None where that is unknown. `malformed` counts repairs."""
        self._properties = properties
        self._malformed = malformed
        self._names: set[str] = set()
        self._head = ""  # what stands before the value: brace or comma, name, colon
        self._streams = False  # the open value is a string that is written as it comes
        self._is_dropped = False
        self._is_text: bool | None = None
        self._value: list[str] = []  # of the open parameter, where it does not stream
        self._wrapper: str | None = None  # the value of a first parameter that may be all of the arguments

    @property
    def is_empty(self) -> bool:
        """Whether no parameter was opened yet."""
        return not self._names

    def open(self, name: str, is_text: bool | None) -> str:
        """A parameter starts. `is_text` None: the markup does not say whether it is a string."""
        piece = self._release()
        self._value.clear()
        self._is_dropped = name in self._names
        if self._is_dropped:
            self._malformed["duplicate_parameter"] += 1
            return piece
        may_wrap = not self._names and name in WRAPPERS and self._properties is not None
        self._wrapper = "" if may_wrap and name not in (self._properties or ()) else None
        self._head = f"{', ' if self._names else '{'}{to_json(name)}: "
        self._names.add(name)
        self._is_text = is_text
        self._streams = is_text is True and self._wrapper is None
        return f'{piece}{self._head}"' if self._streams else piece

    def text(self, text: str) -> str:
        """More of the open value."""
        if self._streams and not self._is_dropped:
            return to_json(text)[1:-1]
        self._value.append(text)
        return ""

    def close(self) -> str:
        """The open value is complete."""
        if self._is_dropped:
            return ""
        if self._streams:
            return '"'
        value = "".join(self._value)
        if self._wrapper is None:
            return self._head + self._whole(value)
        self._wrapper = value
        return ""

    def end(self, body: str) -> str:
        """The call is closed. `body` is what it holds beside its parameters."""
        if self._wrapper is not None:
            inner = _object(self._wrapper)
            if inner is not None and inner.keys() <= (self._properties or {}).keys():
                self._malformed["wrapped_arguments"] += 1
                return to_json(inner)
            return self._release() + "}"
        if self._names:
            return "}"
        if not body.strip():
            return "{}"
        self._malformed["json_body"] += 1
        whole = _object(body)
        return "{}" if whole is None else to_json(whole)

    def cut(self) -> str:
        """The output ended inside the open value: it stays unterminated, the rest of a command is never made up."""
        if self._streams or self._is_dropped:
            return ""
        value = "".join(self._value)
        self._wrapper = None
        return self._head + ('"' + to_json(value)[1:-1] if self._is_text else value)

    def rest(self, body: str) -> str:
        """The output ended between parameters, at its length limit or in a call without any."""
        return self._release() if self._names else body.strip()

    def _release(self) -> str:
        """The first parameter, held as a possible wrapper, is one like any other."""
        if self._wrapper is None:
            return ""
        value, self._wrapper = self._wrapper, None
        return self._head + self._whole(value)

    def _whole(self, value: str) -> str:
        if self._is_text:
            return to_json(value)
        try:
            json.loads(value, parse_constant=_refuse)
            return value.strip()
        except (ValueError, RecursionError):
            pass
        if self._is_text is False:
            self._malformed["value_is_no_json"] += 1
        with contextlib.suppress(ValueError, RecursionError):  # line breaks inside JSON strings are a frequent slip
            return to_json(json.loads(value, parse_constant=_refuse, strict=False))
        return to_json(value)


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text, parse_constant=_refuse)
        to_json(value)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
