"""Remembers the ids of texts: of a conversation's next turn only what is new has to be encoded."""

from __future__ import annotations

import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence


class EncodedTexts:
    """Texts and their ids, the least recently used forgotten first. For any number of threads.

    Args:
        encode: text -> ids; called without the lock, by two threads at once now and then for the same text.
        max_bytes: of texts and ids together.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]], max_bytes: int) -> None:
        self._encode, self._max_bytes = encode, max_bytes
        self._lock = threading.Lock()
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self.num_bytes = 0

    def ids(self, text: str) -> Sequence[int]:
        """The ids of `text`. Raises what `encode` raises."""
        with self._lock:
            found = self._known.get(text)
            if found is not None:
                self._known.move_to_end(text)
                return found
        ids = array("I", self._encode(text))
        size = _size(text, ids)
        with self._lock:
            if text not in self._known and size <= self._max_bytes:
                self._known[text] = ids
                self.num_bytes += size
                while self.num_bytes > self._max_bytes:
                    self.num_bytes -= _size(*self._known.popitem(last=False))
        return ids


def _size(text: str, ids: array[int]) -> int:
    return sys.getsizeof(text) + sys.getsizeof(ids)
