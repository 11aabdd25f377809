"""API keys, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Sequence


class ApiKeys:
    """The accepted keys. None at all means that everybody may come in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def accepts(self, authorization: bytes | None) -> bool:
        """Whether an Authorization header carries one of the keys ("Bearer KEY")."""
        if not self._keys:
            return True
        scheme, _, given = (authorization or b"").strip().partition(b" ")
        given = given.strip()
        matched = False
        for key in self._keys:  # all of them, so that time tells nothing
            matched |= hmac.compare_digest(given, key)
        return matched and given != b"" and scheme.lower() == b"bearer"
