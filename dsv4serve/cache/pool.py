"""Numbered things with reference counts: pages, slots, tails."""

from __future__ import annotations


class PoolError(AssertionError):
    """Bookkeeping is wrong: something was freed twice, or used while free. Always a bug, never a client's fault."""


class Pool:
    """Ids 0 .. size - 1, each free or held by at least one owner. All operations take constant time."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self._counts = [0] * size
        self._free = list(range(size - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Ids without an owner."""
        return len(self._free)

    def count(self, item: int) -> int:
        """Owners of `item`."""
        return self._counts[item]

    def allocate(self) -> int:
        """Take a free id with one owner. The caller has checked `num_free`."""
        if not self._free:
            raise PoolError(f"no free {self.name}")
        item = self._free.pop()
        self._counts[item] = 1
        return item

    def retain(self, item: int) -> None:
        """Add an owner to an id that has one."""
        self._require_held(item, "is used but free")
        self._counts[item] += 1

    def release(self, item: int) -> None:
        """Remove one owner; the id is free after its last."""
        self._require_held(item, "is freed twice")
        self._counts[item] -= 1
        if self._counts[item] == 0:
            self._free.append(item)

    def _require_held(self, item: int, complaint: str) -> None:
        if not 0 <= item < self.size:  # -1 means "none" elsewhere and would silently address the last id
            raise PoolError(f"{self.name} {item} does not exist; ids are 0..{self.size - 1}")
        if self._counts[item] == 0:
            raise PoolError(f"{self.name} {item} {complaint}")


class PagePool(Pool):
    """Pages, where one of the owners can be the prefix tree.

    `num_evictable` counts the pages that only the tree owns: evicting them makes them free. It is kept up to date,
    so that admission knows what it can get before it evicts anything.
    """

    def __init__(self, size: int) -> None:
        super().__init__("page", size)
        self._cached = bytearray(size)
        self.num_evictable = 0

    def retain(self, item: int) -> None:
        """Add an owner to a page that has one."""
        super().retain(item)
        if self._cached[item] and self._counts[item] == 2:
            self.num_evictable -= 1

    def release(self, item: int) -> None:
        """Remove one owner that is not the tree."""
        super().release(item)
        if self._cached[item]:
            if self._counts[item] == 0:
                raise PoolError(f"page {item} is in the prefix tree and freed by someone else")
            if self._counts[item] == 1:
                self.num_evictable += 1

    def cache(self, item: int) -> None:
        """The tree becomes an owner, beside the one that computed the page."""
        super().retain(item)
        if self._cached[item]:
            raise PoolError(f"page {item} is in the prefix tree twice")
        self._cached[item] = 1

    def uncache(self, item: int) -> None:
        """The tree gives up its ownership."""
        if not self._cached[item]:
            raise PoolError(f"page {item} is not in the prefix tree")
        if self._counts[item] == 1:
            self.num_evictable -= 1
        self._cached[item] = 0
        super().release(item)
