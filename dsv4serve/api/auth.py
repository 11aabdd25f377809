"""API keys, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence


class ApiKeys:
    """The accepted keys. None at all means that everybody may come in and do everything."""

    def __init__(self, keys: Sequence[str], admin_key: str = "") -> None:
        self._admin_keys = [admin_key.encode()] if admin_key else []
        self._keys = [key.encode() for key in keys]

    def accepts(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the headers carry a key: "Authorization: Bearer KEY" or "x-api-key: KEY"."""
        return not (self._keys or self._admin_keys) or _any_of([*self._keys, *self._admin_keys], headers)

    def accepts_admin(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the headers carry the admin key, without which a server with keys has no admin."""
        return not (self._keys or self._admin_keys) or _any_of(self._admin_keys, headers)


def _any_of(keys: list[bytes], headers: Mapping[bytes, bytes]) -> bool:
    scheme, _, bearer = headers.get(b"authorization", b"").strip().partition(b" ")
    given = (bearer.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"").strip())
    matched = False
    for key in keys:  # all of them with both, so that time tells nothing
        for value in given:
            matched |= hmac.compare_digest(value, key) and value != b""
    return matched
