"""The Triton indexer against the reference, by the interpreter on the CPU."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel

from dsv4_kernels.arrival import NUM_COUNTERS, counters
from dsv4_kernels.indexer import queries as index_queries
from dsv4_kernels.indexer import reference, triton
from dsv4_kernels.indexer.cases import CASES, DEMO_HEADS, HEADS, Case, Queries, row_scores
from dsv4_kernels.indexer.queries import prepare_queries
from dsv4_kernels.kv_store import Format, RowFormat
from dsv4_kernels.kv_store.triton import prepare_q
from dsv4_kernels.metadata.rows import Rows

FLIPPED = 1e-3  # share of elements where a float32 sum in another order may decide a rounding
# Heads of attention and of the index, dims of the former: as many as Flash, those of the demo and odd ones.
QUERIES = [(64, HEADS, 128), (8, DEMO_HEADS, 128), (11, 3, 512)]
STEP = 2.0**-7  # of bfloat16, relative; such a sum moves a score by at most one


@pytest.fixture
def _poisoned_memory(monkeypatch):
    """Memory that nothing wrote is the largest integer."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def by_reference(arguments, row):
    scores = row_scores(arguments, row)
    if len(scores) <= arguments["top_k"]:
        return list(range(len(scores)))
    chosen = reference.select(scores[None, None], torch.tensor([[len(scores)]]), arguments["top_k"])
    return sorted(chosen.flatten().tolist())


def assert_valid(chosen, visible):
    """The best of the visible entries in ascending order, then -1."""
    width = min(len(chosen), visible)
    assert chosen[:width] == sorted(set(chosen[:width]))
    assert all(0 <= entry < visible for entry in chosen[:width])
    assert chosen[width:] == [-1] * (len(chosen) - width)


@pytest.mark.parametrize(("num_heads", "top_k"), [(HEADS, 64), (DEMO_HEADS, 64), (3, 5)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_choice_is_exact_where_scores_are(case, num_heads, top_k):
    """Small integers: no sum rounds, and many scores are equal, so the lower id has to win."""
    arguments = case.make(num_heads, top_k, 2, whole_numbers=True)
    chosen = triton.select(**arguments)
    assert chosen.shape == (case.num_rows, top_k)
    assert chosen.dtype == torch.int32
    for row in range(sum(case.counts)):
        expected = by_reference(arguments, row)
        assert chosen[row].tolist() == expected + [-1] * (top_k - len(expected))
    if sum(case.counts):
        scores = row_scores(arguments, sum(case.counts) - 1)
        assert len(scores.unique()) < 0.9 * len(scores)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_other_scores_decide_as_the_reference_but_for_one_step_at_the_threshold(case):
    arguments = case.make(HEADS, 64, 3)
    chosen = triton.select(**arguments)
    for row in range(sum(case.counts)):
        scores = row_scores(arguments, row).float()
        assert_valid(chosen[row].tolist(), len(scores))
        expected = by_reference(arguments, row)
        disputed = sorted({entry for entry in chosen[row].tolist() if entry >= 0} ^ set(expected))
        threshold = scores[expected].min() if expected else torch.tensor(0.0)
        assert ((scores[disputed] - threshold).abs() <= STEP * threshold.abs()).all()


LAUNCHES = [256, 0]  # rows that are one launch: all, none


@pytest.mark.parametrize("one_launch_rows", LAUNCHES)
@pytest.mark.parametrize(("chunk", "score_bytes"), [(128, 1 << 28), (32, 1 << 28), (16, 1 << 28), (8192, 1)])
def test_chunks_turns_and_launches_change_nothing(monkeypatch, chunk, score_bytes, one_launch_rows):
    """Lists of small chunks are merged, up to five times over; rows take turns of 16, cut inside of a request."""
    arguments = Case("turns", (0, 640), (3, 30)).make(DEMO_HEADS, 6, 4, whole_numbers=True)
    whole = triton.select(**arguments)
    monkeypatch.setattr(triton, "CHUNK", chunk)
    monkeypatch.setattr(triton, "MAX_SCORE_BYTES", score_bytes)
    monkeypatch.setattr(triton, "ONE_LAUNCH_ROWS", one_launch_rows)
    found = triton.select(**arguments)
    assert torch.equal(found, whole)
    assert not counters(found.device, NUM_COUNTERS).any()
    for row in range(33):
        expected = by_reference(arguments, row)
        assert found[row].tolist() == expected + [-1] * (6 - len(expected))


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("one_launch_rows", LAUNCHES)
def test_contexts_around_every_boundary(monkeypatch, one_launch_rows):
    """One more or less than top_k, a list, a product, a page and the lists of a merge; all scores equal in two rows."""
    monkeypatch.setattr(triton, "CHUNK", 32)
    monkeypatch.setattr(triton, "ONE_LAUNCH_ROWS", one_launch_rows)
    edges = [entries + more for entries in (8, 32, 64, 128, 160) for more in (-1, 0, 1)]
    starts = tuple(4 * entries - 1 for entries in edges)
    arguments = Case("edges", starts, (1,) * len(starts)).make(DEMO_HEADS, 8, 9, whole_numbers=True)
    arguments["weights"][[4, -1]] = 0
    found = triton.select(**arguments)
    for row, visible in enumerate(edges):
        expected = by_reference(arguments, row)
        assert len(expected) == min(8, visible)
        assert found[row].tolist() == expected + [-1] * (8 - len(expected))
    assert found[-1].tolist() == list(range(8))


def test_few_rows_are_one_launch_at_any_context(monkeypatch):
    launched = []
    monkeypatch.setattr(triton, "_choose", lambda *_: launched.append("top_k"))
    monkeypatch.setattr(triton, "CHUNK", 32)
    for start in (3, 200, 2047):
        triton.select(**Case("few", (start,), (4,)).make(DEMO_HEADS, 8, 10))
    assert not launched
    monkeypatch.setattr(triton, "ONE_LAUNCH_ROWS", 3)
    triton.select(**Case("more", (200,), (4,)).make(DEMO_HEADS, 8, 10))
    assert launched


@pytest.mark.usefixtures("_poisoned_memory")
def test_padding_rows_are_not_written():
    case = CASES[2]
    arguments = case.make(DEMO_HEADS, 64, 5)
    unwritten = torch.iinfo(torch.int32).max
    chosen = triton.select(**arguments)
    real = sum(case.counts)
    assert (chosen[real:] == unwritten).all()
    assert (chosen[:real] != unwritten).all()


def test_rows_that_see_few_entries_get_all_without_scores():
    case = Case("start", (0, 250), (9, 3))
    arguments = case.make(DEMO_HEADS, 64, 6)
    arguments["q"][:] = torch.nan
    chosen = triton.select(**arguments)
    for row, position in enumerate([*range(9), 250, 251, 252]):
        visible = (position + 1) // 4
        assert chosen[row].tolist() == list(range(visible)) + [-1] * (64 - visible)


def test_a_request_is_chosen_for_alike_beside_a_broken_one_and_alone():
    case = Case("batch", (600, 700, 800), (5, 20, 3))
    together = triton.select(**case.make(HEADS, 64, 7))
    broken = case.make(HEADS, 64, 7)
    broken["q"][5:25] = torch.nan
    chosen = triton.select(**broken)
    assert torch.equal(chosen[:5], together[:5])
    assert torch.equal(chosen[25:], together[25:])
    for row in range(5, 25):
        assert_valid(chosen[row].tolist(), (700 + row - 5 + 1) // 4)

    alone = case.make(HEADS, 64, 7)
    slot, start, count = (torch.tensor([value], dtype=torch.int32) for value in (alone["rows"].slots[25], 800, 3))
    one = {"q": alone["q"][25:], "weights": alone["weights"][25:], "rows": Rows.build(slot, start, count, 3)}
    assert torch.equal(triton.select(**alone | one), together[25:])


def test_counts_of_a_decode_step():
    case = Case("two", (4095, 255), (1, 1))  # 1,024 and 64 visible entries; only the first chooses
    assert case.num_scores(512) == 1024
    assert case.moved_bytes(HEADS, 512) == 1024 * 68 + 2 * (64 * 129 * 2 + 4 * 512)
    assert case.flops(HEADS, 512) == 1024 * 64 * 259


def test_what_the_kernels_do_not_take_is_refused():
    arguments = CASES[0].make(DEMO_HEADS, 64, 8)
    with pytest.raises(ValueError, match="expected bfloat16 and index_fp4"):
        triton.select(**arguments | {"row_format": RowFormat(Format.INDEX_FP8, 128)})
    with pytest.raises(ValueError, match="top_k is 5000; the kernels take at most 2048"):
        triton.select(**arguments | {"top_k": 5000})


@pytest.mark.parametrize(("num_heads", "index_heads", "head_dim"), QUERIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_queries_of_both_kinds_are_what_the_model_makes_of_them(case, num_heads, index_heads, head_dim):
    queries = Queries(case.rows(), num_heads, index_heads, head_dim)
    arguments, real = queries.make(1), sum(case.counts)
    heads, expected, expected_weights = queries.split(arguments)
    alone = prepare_q(heads.clone(), arguments["eps"], arguments["rotations"], arguments["rows"])
    before = arguments["queries"].clone()
    q, index_q, weights = prepare_queries(**arguments)
    assert q.data_ptr() == arguments["queries"].data_ptr()
    assert q.shape == alone.shape
    assert torch.equal(q[:real], alone[:real])
    assert (arguments["queries"][:real] != before[:real]).any() == bool(real)
    columns = num_heads * head_dim
    assert torch.equal(arguments["queries"][:, columns:], before[:, columns:])
    assert torch.equal(arguments["queries"][real:], before[real:])
    assert index_q.dtype == expected.dtype
    assert (index_q != expected)[:real].sum() <= FLIPPED * expected.numel()
    assert torch.equal(weights[:real], expected_weights[:real])


@pytest.mark.usefixtures("_poisoned_memory")
def test_padding_rows_of_queries_are_not_written():
    case = CASES[2]
    arguments, real = Queries(case.rows(), 8, DEMO_HEADS, 128).make(2), sum(case.counts)
    arguments["queries"][real:] = 7
    q, index_q, weights = prepare_queries(**arguments)
    assert (q[real:] == 7).all()
    assert index_q[real:].isnan().all()
    assert weights[real:].isnan().all()
    assert index_q[:real].isfinite().all()


def test_many_rows_take_two_launches_for_the_same_bits(monkeypatch):
    arguments = Queries(Case("three", (9, 70, 300), (1, 1, 1)).rows(), 8, DEMO_HEADS, 128).make(4)
    given = arguments["queries"].clone()
    few = prepare_queries(**arguments)
    monkeypatch.setattr(index_queries, "MANY", 1)
    many = prepare_queries(**arguments | {"queries": given})
    assert all(torch.equal(one, other) for one, other in zip(few, many, strict=True))


def test_queries_have_the_same_bits_alone_and_beside_a_broken_one():
    together = Queries(Case("three", (9, 70, 300), (1, 1, 1)).rows(), 8, DEMO_HEADS, 128).make(3)
    rows = Case("one", (300,), (1,)).rows()
    alone = together | {
        "rows": rows, "queries": together["queries"][2:].clone(), "weights": together["weights"][2:],
        "rotations": together["rotations"][2:],
    }  # fmt: skip
    together["queries"][0] = torch.nan
    for one, three in zip(prepare_queries(**alone), prepare_queries(**together), strict=True):
        assert torch.equal(one[0], three[2])


def test_queries_that_the_kernel_does_not_take_are_refused():
    arguments = Queries(Case("one", (5,), (1,)).rows(), 8, DEMO_HEADS, 128).make(4)
    with pytest.raises(ValueError, match="1536 columns for 7 heads of 128 dims and 4 index heads; expected powers of"):
        prepare_queries(**arguments | {"num_heads": 7})
    with pytest.raises(ValueError, match="expected bfloat16 and contiguous columns"):
        prepare_queries(**arguments | {"queries": arguments["queries"].float()})
    with pytest.raises(ValueError, match="32 of them rotated"):
        prepare_queries(**arguments | {"rotations": arguments["rotations"][:, :16]})
