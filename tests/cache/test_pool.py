"""Pools count owners, and refuse what cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4serve.cache import PagePool, Pool, PoolError


def test_every_id_is_handed_out_once() -> None:
    pool = Pool("slot", 5)
    assert sorted(pool.allocate() for _ in range(5)) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    with pytest.raises(PoolError, match="no free slot"):
        pool.allocate()


def test_an_id_is_free_after_its_last_owner() -> None:
    pool = Pool("page", 1)
    page = pool.allocate()
    pool.retain(page)
    pool.release(page)
    assert (pool.count(page), pool.num_free) == (1, 0)
    pool.release(page)
    assert (pool.count(page), pool.num_free) == (0, 1)


def test_double_free_and_use_after_free_are_errors() -> None:
    pool = Pool("page", 2)
    page = pool.allocate()
    pool.release(page)
    with pytest.raises(PoolError, match=f"page {page} is freed twice"):
        pool.release(page)
    with pytest.raises(PoolError, match=f"page {page} is used but free"):
        pool.retain(page)
    assert pool.num_free == 2


@pytest.mark.parametrize("item", [-1, 2, 99])
def test_ids_that_do_not_exist_are_errors(item: int) -> None:
    pool = Pool("tail", 2)
    pool.allocate()
    pool.allocate()
    for operation in (pool.retain, pool.release):
        with pytest.raises(PoolError, match=r"ids are 0\.\.1"):
            operation(item)


def test_a_cached_page_is_evictable_when_only_the_tree_owns_it() -> None:
    pool = PagePool(2)
    page = pool.allocate()
    pool.cache(page)
    assert pool.num_evictable == 0
    pool.release(page)
    assert pool.num_evictable == 1
    pool.retain(page)
    assert pool.num_evictable == 0
    pool.uncache(page)
    assert (pool.num_evictable, pool.num_free) == (0, 1)
    pool.release(page)
    assert pool.num_free == 2


def test_tree_ownership_is_taken_and_given_up_once() -> None:
    pool = PagePool(1)
    page = pool.allocate()
    with pytest.raises(PoolError, match="not in the prefix tree"):
        pool.uncache(page)
    pool.cache(page)
    with pytest.raises(PoolError, match="twice"):
        pool.cache(page)


def test_nobody_frees_the_page_under_the_tree() -> None:
    pool = PagePool(1)
    page = pool.allocate()
    pool.cache(page)
    pool.release(page)
    with pytest.raises(PoolError, match="freed by someone else"):
        pool.release(page)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "retain", "release"]), st.integers(0, 4)), max_size=60))
def test_a_pool_agrees_with_a_dictionary_of_counts(operations: list[tuple[str, int]]) -> None:
    pool, counts = Pool("page", 5), dict.fromkeys(range(5), 0)
    for name, item in operations:
        if name == "allocate":
            if pool.num_free:
                counts[pool.allocate()] += 1
        elif counts[item]:
            getattr(pool, name)(item)
            counts[item] += 1 if name == "retain" else -1
        else:
            with pytest.raises(PoolError):
                getattr(pool, name)(item)
        assert [pool.count(each) for each in range(5)] == list(counts.values())
        assert pool.num_free == sum(count == 0 for count in counts.values())
