"""JSON in pieces, for bodies so large that one call of the parser would stop all other threads for too long.

orjson holds the interpreter's lock while it works: 5 MB of small lists take 0.1 s, in whatever thread it runs. So the
text is cut at commas into pieces, whose values are put together here; between two pieces other threads can run.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

PIECE_BYTES = 1 << 16
MAX_VALUES = 1 << 21  # to free many more values, which is one call as well, would take too long again
MAX_DEPTH = 1000  # about what orjson allows
SYNTAX = re.compile(rb'["\[\]{},]')
SPACE = b" \t\n\r"
CLOSING = {ord("["): ord("]"), ord("{"): ord("}")}


class _Open:
    """A list or object whose end has not come yet. `value` is None as long as it fits into a piece."""

    __slots__ = ("after_child", "item", "kind", "pending", "start", "value")

    def __init__(self, kind: int, start: int) -> None:
        self.kind, self.start = kind, start
        self.pending = self.item = start + 1  # where the first item begins that is not in `value`, and where the last
        self.after_child = -1  # the end of the last item, if it is in `value` already
        self.value: list[Any] | dict[str, Any] | None = None


def loads(raw: bytes, piece_bytes: int = PIECE_BYTES) -> Any:
    """`raw` as orjson.loads reads it. No call of orjson gets more than `piece_bytes` and one item.

    Raises ValueError for what is no JSON, for more than MAX_VALUES values, and for too deep nesting.
    """
    stack: list[_Open] = []
    position, num_values = 0, 0
    found = SYNTAX.search(raw)
    while found is not None:
        position, byte = found.start(), raw[found.start()]
        if byte == ord('"'):
            position = _end_of_string(raw, position)
        elif byte == ord(","):
            num_values += 1
            if stack:
                _comma(raw, stack[-1], position, piece_bytes)
        elif byte in CLOSING:
            num_values += 1
            stack.append(_Open(byte, position))
        else:
            if not stack or CLOSING[stack[-1].kind] != byte:
                raise ValueError(f"a bracket at byte {position} closes nothing")
            if _close(raw, stack, position, piece_bytes):
                break
        if num_values > MAX_VALUES or len(stack) > MAX_DEPTH:
            raise ValueError(f"more than {MAX_VALUES} values, or nested more than {MAX_DEPTH} deep")
        found = SYNTAX.search(raw, position + 1)
    else:  # a text without brackets, or the end is missing
        if stack:
            raise ValueError(f"a bracket at byte {stack[-1].start} is not closed")
        return orjson.loads(raw)
    whole = stack[0]
    if raw[: whole.start].strip(SPACE) or raw[position + 1 :].strip(SPACE):
        raise ValueError("there is something beside the outermost value")
    return orjson.loads(raw[whole.start : position + 1]) if whole.value is None else whole.value


def _end_of_string(raw: bytes, start: int) -> int:
    """The position of the quote that closes the string."""
    end = start
    while (end := raw.find(b'"', end + 1)) >= 0:
        first = end
        while raw[first - 1] == ord("\\"):
            first -= 1
        if (end - first) % 2 == 0:
            return end
    raise ValueError(f"a string at byte {start} does not end")


def _comma(raw: bytes, owner: _Open, position: int, piece_bytes: int) -> None:
    """The end of an item that is not the last."""
    if owner.after_child >= 0:
        _skip_child(raw, owner, position)
    elif position - owner.pending >= piece_bytes:
        _take(raw, owner, position)
    else:
        owner.item = position + 1
        return
    owner.pending = owner.item = position + 1


def _close(raw: bytes, stack: list[_Open], position: int, piece_bytes: int) -> bool:
    """The end of the innermost list or object. True when it is the outermost one, which then stays on the stack."""
    child = stack[-1]
    if child.value is not None:
        if child.after_child >= 0:
            _skip_child(raw, child, position)
        else:
            _take(raw, child, position)
    elif position - child.start >= piece_bytes and raw[child.start + 1 : position].strip(SPACE):
        _take(raw, child, position)
    if len(stack) == 1:
        return True
    stack.pop()
    if child.value is not None:
        owner = stack[-1]
        if owner.item > owner.pending:
            _take(raw, owner, owner.item - 1)
        if owner.value is None:
            owner.value = [] if owner.kind == ord("[") else {}
        # What stands between the comma and the child: nothing, or a key.
        head = _piece(raw, owner, owner.item, child.start, b"null")
        if len(head) != 1:
            raise ValueError(f"no value at byte {child.start}")
        if isinstance(owner.value, list):
            owner.value.append(child.value)
        else:
            owner.value[next(iter(head))] = child.value
        owner.after_child = position + 1
    return False


def _skip_child(raw: bytes, owner: _Open, position: int) -> None:
    if raw[owner.after_child : position].strip(SPACE):
        raise ValueError(f"something behind the value that ends at byte {owner.after_child}")
    owner.after_child = -1


def _take(raw: bytes, owner: _Open, end: int) -> None:
    """Move the items from `pending` to `end` into the owner's value."""
    items = _piece(raw, owner, owner.pending, end)
    if not items:
        raise ValueError(f"no value before byte {end}")
    if owner.value is None:
        owner.value = items
    elif isinstance(owner.value, list):
        owner.value += items
    else:
        owner.value.update(items)


def _piece(raw: bytes, owner: _Open, start: int, end: int, rest: bytes = b"") -> Any:
    """The items in raw[start:end] + `rest`, as a list or object."""
    text = bytes((owner.kind,)) + raw[start:end] + rest + bytes((CLOSING[owner.kind],))
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{error} of what stands from byte {start} on") from None
