"""Tags of the call markup, read character by character behind their DSML marker."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

MAX_TAG_CHARS = 1024
HEAD = re.compile(r"\s*(invoke|parameter)\b(.*)", re.IGNORECASE | re.DOTALL)
WRAPPER = re.compile(r"\s*[A-Za-z_][\w-]*(\s.*)?", re.DOTALL)
ATTRIBUTE = re.compile(r"""\s*([\w-]+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>/]+))(?=[\s/]|\Z)""")
# A name with quotes in it reaches up to the last quote that lets the rest make sense.
QUOTED_NAME = re.compile(r'\s*name\s*=\s*"(.+?)"(?:\s+string\s*=\s*"(true|false)")?\s*(/?)\s*', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Tag:
    """One tag. "wrapper" is every tag that is no invoke and no parameter, "broken" text that became no tag."""

    kind: Literal["invoke", "parameter", "wrapper", "broken"]
    is_closing: bool
    text: str  # without brackets and marker
    name: str = ""  # of the function or parameter
    is_text: bool | None = None  # of an opening parameter: its `string` attribute, None where it is missing
    is_empty: bool = False  # ends in "/>"


class TagReader:
    """Collects one tag: up to the first ">" at which it makes sense, a line's end, or MAX_TAG_CHARS."""

    def __init__(self, is_closing: bool) -> None:
        self._is_closing = is_closing
        self._text = ""

    def feed(self, character: str) -> Tag | None:
        """The tag, once `character` ends it."""
        if character == ">":
            tag = _read(self._text, self._is_closing)
            if tag is not None:
                return tag
        self._text += character
        return self.broken() if character == "\n" or len(self._text) == MAX_TAG_CHARS else None

    def broken(self) -> Tag:
        """What there is, when no tag can come of it any more. A closing tag that lacks its end still closes."""
        if self._is_closing and (tag := _read(self._text, True)) is not None:
            return tag
        return Tag("broken", self._is_closing, self._text)


def _read(text: str, is_closing: bool) -> Tag | None:
    head = HEAD.fullmatch(text)
    kind = head[1].lower() if head else "wrapper"
    if is_closing or head is None:
        return Tag(kind, is_closing, text) if WRAPPER.fullmatch(text) else None  # type: ignore[arg-type]
    attributes = _attributes(head[2])
    if attributes is None or not attributes.get("name"):
        return None
    is_text = {"true": True, "false": False}.get(attributes.get("string", "").strip().lower())
    return Tag(kind, False, text, attributes["name"], is_text, "/" in attributes)  # type: ignore[arg-type]


def _attributes(text: str) -> dict[str, str] | None:
    """Attributes by lower-case name, and "/" for a tag that closes itself; None when the text is not all attributes."""
    found: dict[str, str] = {}
    position = 0
    while match := ATTRIBUTE.match(text, position):
        found.setdefault(match[1].lower(), next(value for value in match.groups()[1:] if value is not None))
        position = match.end()
    rest = text[position:].strip()
    if rest in ("", "/"):
        return found | ({"/": ""} if rest else {})
    quoted = QUOTED_NAME.fullmatch(text)
    if quoted is None:
        return None
    return {"name": quoted[1], "string": quoted[2] or ""} | ({"/": ""} if quoted[3] else {})
