"""Hits end at tails, nothing useless stays, the least recently used goes first."""

from __future__ import annotations

from array import array

from dsv4serve.cache import PagePool, Pool, PrefixTree, extend_keys


class Cache:
    """A tree with its pools. `store` computes and forgets a prompt, `hold` stays on its pages."""

    def __init__(self, num_pages: int = 12, num_tails: int = 6) -> None:
        self.pages, self.tails = PagePool(num_pages), Pool("tail", num_tails)
        self.tree = PrefixTree(self.pages, self.tails)

    def store(self, path: str, release: bool = True) -> list[int]:
        """One page per letter, a tail behind the last."""
        pages = [self.pages.allocate() for _ in path]
        self.tree.insert(keys(path), pages, self.tails.allocate())
        for page in pages if release else ():
            self.pages.release(page)
        return pages

    def hit(self, path: str) -> int:
        return len(self.tree.match(keys(path)).pages)

    def use(self, path: str) -> None:
        self.tree.use(keys(path))

    @property
    def paths(self) -> set[str]:
        """Every node as its letters."""
        found = set()
        for node in self.tree.nodes():
            letters = ""
            while node.parent is not None:
                letters = node.key.decode() + letters
                node = node.parent
            found.add(letters)
        return found


def keys(path: str) -> list[bytes]:
    return [letter.encode() for letter in path]


def test_a_hit_ends_at_the_deepest_tail() -> None:
    cache = Cache()
    pages = cache.store("ab")
    assert cache.tree.match(keys("abc")).pages == pages
    assert cache.tree.match(keys("a")) == ([], -1, 1)  # known, but no tail behind it
    assert cache.tree.match(keys("x")) == ([], -1, 0)


def test_a_longer_prompt_extends_the_chain_without_copies() -> None:
    cache = Cache()
    first = cache.store("ab")
    second = cache.store("abc")
    assert cache.tree.match(keys("abc")).pages == [*first, second[2]]
    assert cache.pages.num_free == 12 - 3
    assert cache.tails.num_free == 6 - 2


def test_a_node_keeps_its_page_and_tail_and_the_later_copy_is_freed() -> None:
    cache = Cache()
    first = cache.store("ab")
    tail = cache.tree.match(keys("ab")).tail
    cache.store("ab")
    assert cache.tree.match(keys("ab")) == (first, tail, 2)
    assert cache.pages.num_free == 12 - 2
    assert cache.tails.num_free == 6 - 1


def test_a_lost_tail_is_healed() -> None:
    cache = Cache()
    cache.store("a")
    cache.store("ab")
    assert cache.tree.evict_tail()  # that of "a", the older one
    assert cache.hit("a") == 0
    cache.store("a")
    assert cache.hit("a") == 1
    assert cache.hit("ab") == 2


def test_losing_the_tail_of_a_leaf_prunes_up_to_the_next_tail_or_branch() -> None:
    cache = Cache()
    cache.store("abcd")
    cache.store("ab")
    cache.store("abxy")
    cache.use("ab")
    assert cache.tree.evict_tail()
    assert cache.paths == {"a", "ab", "abx", "abxy"}
    assert cache.tree.evict_tail()
    assert cache.paths == {"a", "ab"}
    assert cache.tree.evict_tail()
    assert cache.paths == set()
    assert not cache.tree.evict_tail()
    assert cache.pages.num_free == 12
    assert cache.tails.num_free == 6


def test_pages_are_evicted_from_the_leaf_that_was_used_least_recently() -> None:
    cache = Cache()
    cache.store("a")
    cache.store("b")
    cache.use("a")
    assert cache.tree.evict_page()
    assert cache.paths == {"a"}


def test_a_prefix_in_use_survives_its_cold_continuations() -> None:
    """A system prompt that everybody hits must not go because one conversation behind it went cold."""
    cache = Cache()
    cache.store("s")
    cache.store("sx")
    cache.store("y")
    cache.use("s")
    assert cache.tree.evict_page()
    assert cache.paths == {"s", "y"}
    assert cache.tree.evict_page()
    assert cache.paths == {"s"}


def test_a_page_that_a_request_holds_is_not_freed() -> None:
    cache = Cache(num_pages=3)
    held = cache.store("a", release=False)
    cache.store("b")
    assert cache.tree.evict_page()
    assert cache.pages.count(held[0]) >= 1
    assert not cache.tree.evict_page()
    assert cache.pages.num_free == 2


def test_pages_under_somebody_elses_continuation_can_be_had() -> None:
    """The tree's "a" belongs to nobody, but below it stands a page that a running request holds."""
    cache = Cache()
    cache.store("a")
    held = cache.store("ab", release=False)
    cache.pages.release(held[0])  # its own copy of "a" is not the tree's
    assert cache.pages.num_evictable == 1
    assert cache.tree.evict_page()
    assert cache.pages.num_evictable == 0
    assert cache.pages.count(held[1]) == 1


def test_prompts_are_compared_by_their_tokens() -> None:
    first, second = list(range(256)), [*range(255), 256]
    assert extend_keys([], first) != extend_keys([], second)
    assert extend_keys([], first)[0] == array("q", first).tobytes()


def test_keys_cover_whole_pages_and_grow_with_the_tokens() -> None:
    tokens = list(range(600))
    known = extend_keys([], tokens[:511])
    assert len(known) == 1
    assert extend_keys(known, tokens) == extend_keys([], tokens)
    assert len(known) == 2


def test_clear_leaves_only_what_requests_hold() -> None:
    cache = Cache()
    cache.store("ab")
    held = cache.store("cd", release=False)
    cache.tree.clear()
    assert cache.paths == set()
    assert cache.pages.num_free == 12 - len(held)
    assert cache.tails.num_free == 6


def test_a_prefix_of_a_million_tokens_is_pruned_without_recursion() -> None:
    cache = Cache(num_pages=4096, num_tails=1)
    pages = [cache.pages.allocate() for _ in range(4096)]
    cache.tree.insert([b"%d" % index for index in range(4096)], pages, cache.tails.allocate())
    for page in pages:
        cache.pages.release(page)
    assert cache.tree.evict_page()
    assert cache.pages.num_free == 4096
