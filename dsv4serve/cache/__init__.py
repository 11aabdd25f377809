"""Bookkeeping of pages, slots, prefix tree and tails. Torch-free."""

from dsv4serve.cache.pool import PagePool, Pool, PoolError
from dsv4serve.cache.prefix_tree import Match, PrefixTree, extend_keys

__all__ = ["Match", "PagePool", "Pool", "PoolError", "PrefixTree", "extend_keys"]
