"""Which prompts are already in the cache: a tree with one node per page of 256 tokens.

A node owns one reference on its page and may own a tail, the snapshot that lets a request continue behind it. A hit
ends at the deepest node with a tail, so a page with no tail at or below it is useless: every leaf owns a tail, and
losing it prunes upwards to the next node that has a tail or other children.

Recency: using a node makes it and then its ancestors the most recent, so a descendant always stands before its
ancestors and the least recent node of all is a leaf. Tails have an order of their own, by hits.

Why one node per page, and what else was considered: docs/adr/0001-one-node-per-page.md.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dsv4serve.cache.pool import PagePool, Pool
from dsv4serve.types import PAGE_TOKENS


class Node:
    """One page of tokens after its parent's."""

    __slots__ = ("children", "key", "page", "parent", "tail")

    def __init__(self, parent: Node | None, key: bytes, page: int) -> None:
        self.parent, self.key, self.page = parent, key, page
        self.tail = -1
        self.children: dict[bytes, Node] = {}


class Match(NamedTuple):
    """What the tree knows of a prompt."""

    pages: list[int]  # the pages up to the deepest tail: the hit
    tail: int  # the tail there; -1 = no hit
    num_known_pages: int  # pages in the tree, with or without a tail behind them


class PrefixTree:
    """The tree over two pools. Keys are `extend_keys`' bytes, one per whole page."""

    def __init__(self, pages: PagePool, tails: Pool) -> None:
        self._pages, self._tails = pages, tails
        self._root = Node(None, b"", -1)
        self._order: OrderedDict[Node, None] = OrderedDict()  # all nodes, least recently used first
        self._tail_order: OrderedDict[Node, None] = OrderedDict()  # those with a tail
        self.num_evicted_pages, self.num_evicted_tails = 0, 0  # since the start

    @property
    def num_tails(self) -> int:
        """Tails that the tree owns; all of them can be evicted."""
        return len(self._tail_order)

    def match(self, keys: Sequence[bytes]) -> Match:
        """Longest reusable prefix. Changes nothing; the caller retains the pages before it evicts anything."""
        node = self._root
        pages: list[int] = []
        num_hit, tail = 0, -1
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            node = child
            pages.append(node.page)
            if node.tail >= 0:
                num_hit, tail = len(pages), node.tail
        return Match(pages[:num_hit], tail, len(pages))

    def use(self, keys: Sequence[bytes]) -> None:
        """A request continues behind `keys`, as matched: they and the tail there become the most recent."""
        node = self._root
        for key in keys:
            node = node.children[key]
        self._touch(node)

    def insert(self, keys: Sequence[bytes], pages: Sequence[int], tail: int) -> None:
        """Remember `pages` of the tokens `keys` (at least one), behind which `tail` was taken.

        The tree takes over the caller's reference on the tail and adds its own on pages that are new to it. Where a
        page of the same tokens is already known the tree keeps that one and the caller keeps its copy; a node that
        had lost its tail gets this one.
        """
        node = self._root
        for key, page in zip(keys, pages, strict=True):
            child = node.children.get(key)
            if child is None:
                child = Node(node, key, page)
                self._pages.cache(page)
                node.children[key] = child
            node = child
        if node.tail >= 0:
            self._tails.release(tail)
        else:
            node.tail = tail
        self._touch(node)

    def evict_tail(self) -> bool:
        """Free the least recently used tail. False when the tree has none."""
        if not self._tail_order:
            return False
        self._drop_tail(next(iter(self._tail_order)))
        return True

    def evict_page(self) -> bool:
        """Free at least one page, the least recently used. False when requests hold all that are cached.

        A leaf on the way whose page a request holds is forgotten too (the request keeps the page, and brings it back
        when it ends): so every page that only the tree owns can be had, whatever stands below it.
        """
        num_free = self._pages.num_free
        while self._pages.num_evictable:
            self._drop_tail(next(iter(self._order)))
            if self._pages.num_free > num_free:
                return True
        return False

    def clear(self) -> None:
        """Forget everything; pages that requests hold stay with them."""
        while self.evict_tail():
            pass

    def nodes(self) -> Iterator[Node]:
        """All nodes, least recently used first."""
        return iter(self._order)

    def _touch(self, node: Node) -> None:
        """Make `node`, which has a tail, the most recent, and its ancestors more recent still."""
        self._tail_order[node] = None
        self._tail_order.move_to_end(node)
        above: Node | None = node
        while above is not None and above.parent is not None:
            self._order[above] = None
            self._order.move_to_end(above)
            above = above.parent

    def _drop_tail(self, node: Node) -> None:
        """Take the tail of `node` and every page that is useless without it."""
        self._tails.release(node.tail)
        node.tail = -1
        del self._tail_order[node]
        self.num_evicted_tails += 1
        while node.parent is not None and node.tail < 0 and not node.children:
            del self._order[node]
            self._pages.uncache(node.page)
            self.num_evicted_pages += 1
            del node.parent.children[node.key]
            node = node.parent


def extend_keys(keys: list[bytes], token_ids: Sequence[int], salt: str = "") -> list[bytes]:
    """Append to `keys` those of the whole pages of `token_ids` that it lacks, and return it.

    A key is the page's token ids as bytes: compared whole, never by a hash alone (bytes remember their hash, so
    matching a long prompt again is cheap). The first one ends with the salt: everything behind it is below it.
    """
    for first in range(len(keys) * PAGE_TOKENS, len(token_ids) // PAGE_TOKENS * PAGE_TOKENS, PAGE_TOKENS):
        key = array("q", token_ids[first : first + PAGE_TOKENS]).tobytes()
        keys.append(key if first else key + salt.encode())
    return keys
