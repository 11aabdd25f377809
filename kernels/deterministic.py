"""Whether a row's bits may depend on the other rows of its step: one switch, which every choice by their number asks.

Off, each operation takes the form that is fastest for so many rows, and the forms add a row's sums in different orders.
On, an operation has one form, and its sums are cut by the shapes of weights and by the row's own context alone. What
that relies on, and what each operation does: docs/adr/0010-a-row-has-its-own-bits.md.

The switch is of the process, as the choices are: a captured graph keeps what was chosen when it was captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_is_on = False


def is_deterministic() -> bool:
    """Whether the choices are for a row alone."""
    return _is_on


def set_deterministic(is_on: bool) -> None:
    """For all launches from now on."""
    global _is_on
    _is_on = is_on


@contextmanager
def deterministic(is_on: bool = True) -> Iterator[None]:
    """On (or off) inside, as before behind it."""
    before = _is_on
    set_deterministic(is_on)
    try:
        yield
    finally:
        set_deterministic(before)
