"""The Triton writes of window rows and the preparation of queries against the references, by the interpreter."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel

from dsv4_kernels.cases import DEMO, PRO, Shapes
from dsv4_kernels.kv_store.bench import query_bytes, store_bytes
from dsv4_kernels.kv_store.cases import CASES, EPS, POISON, Case, exact, expected_rows, kv_format, poisoned_planes
from dsv4_kernels.kv_store.triton import commit, prepare_q, store_kv
from dsv4_kernels.norm.reference import head_norm
from dsv4_kernels.rope.reference import apply_rope

DEMOS = [case for case in CASES if case.shapes is DEMO]
CHUNKS = Case("chunks", DEMO, ((0, 1), (30, 4), (50, 5), (12, 21), (7, 60)), num_padding=2, num_drafts=3, window=16)


def expected_ring(case, encoded, late):
    """The ring after a step: what enters before attention, and with `late` also what comes after it."""
    ring = poisoned_planes(case.num_slots * case.ring_rows, kv_format(case.shapes))
    first = 0
    for slot, (start, count) in zip(case.slots, case.requests, strict=True):
        if count <= case.ring_rows - case.window + 1 or late:
            for row in range(max(0, count - case.ring_rows), count):
                for plane, new in zip(ring, encoded, strict=True):
                    plane[slot * case.ring_rows + (start + row) % case.ring_rows] = new[first + row]
        first += count
    return ring


@pytest.mark.parametrize("case", [*DEMOS, CHUNKS, Case("pro", PRO, ((0, 1), (126, 3)), 1)], ids=lambda case: case.name)
def test_rows_are_stored_bit_for_bit_and_nothing_else_is_written(case):
    inputs = exact(case.make(1), "latent_kv")
    store_kv(**inputs)
    encoded = expected_rows(inputs, case.shapes)
    for found, new in zip(inputs["step_planes"], encoded, strict=True):
        assert torch.equal(found[: case.num_tokens], new[: case.num_tokens])
        assert (found[case.num_tokens :] == POISON).all()
    for found, ring in zip(inputs["ring_planes"], expected_ring(case, encoded, late=False), strict=True):
        assert torch.equal(found, ring)
    commit(*(inputs[key] for key in ("rows", "step_planes", "ring_planes", "ring_rows", "window")))
    for found, ring in zip(inputs["ring_planes"], expected_ring(case, encoded, late=True), strict=True):
        assert torch.equal(found, ring)


def test_random_rows_differ_only_where_the_order_of_a_sum_decides_a_rounding():
    case = Case("pro", PRO, tuple((position, 1) for position in range(0, 64_000, 1_000)))
    inputs = case.make(2)
    store_kv(**inputs)
    for found, new in zip(inputs["step_planes"], expected_rows(inputs, case.shapes), strict=True):
        assert (found != new).float().mean() < 1e-3


def test_a_row_never_overwrites_one_that_the_step_reads():
    """The oldest position that the first row of a request sees is still in the ring after the early store."""
    for count in range(1, 8):
        case = Case("live", DEMO, ((40, count),), num_drafts=3, window=16)
        inputs = case.make(3)
        store_kv(**inputs)
        slot = case.slots[0]
        oldest = [slot * case.ring_rows + position % case.ring_rows for position in range(40 - 15, 40)]
        assert all((plane[oldest] == POISON).all() for plane in inputs["ring_planes"])


def test_nan_stays_in_its_row():
    case = Case("nan", DEMO, ((5, 3),))
    inputs = case.make(4)
    inputs["latent_kv"][1, 7] = torch.nan
    store_kv(**inputs)
    assert (inputs["step_planes"][0][1, :64] & 0x7F == 0x7F).all()
    expected = expected_rows(inputs, case.shapes)
    for found, new in zip(inputs["step_planes"], expected, strict=True):
        assert (found[[0, 2]] != new[[0, 2]]).float().mean() < 0.01


@pytest.mark.parametrize("case", [*DEMOS, Case("pro", PRO, ((0, 1), (126, 3)), 1)], ids=lambda case: case.name)
def test_queries_equal_head_norm_and_rope(case):
    inputs = exact(case.queries(5), "q")
    expected = apply_rope(head_norm(inputs["q"], EPS), inputs["rotations"])[: case.num_tokens]
    out = torch.full(inputs["q"].shape, 7.0, dtype=torch.bfloat16)
    assert prepare_q(**inputs, out=out) is out
    assert torch.equal(out[: case.num_tokens], expected)
    assert (out[case.num_tokens :] == 7.0).all()
    assert prepare_q(**inputs) is inputs["q"]
    assert torch.equal(inputs["q"][: case.num_tokens], out[: case.num_tokens])


def test_random_queries_differ_by_one_rounding_of_the_root():
    inputs = Case("pro", PRO, ((9_000, 2),)).queries(6)
    expected = apply_rope(head_norm(inputs["q"], EPS), inputs["rotations"])
    found = prepare_q(**inputs)
    assert ((found != expected).any(-1)).float().mean() < 0.05
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)


def test_the_floor_of_a_row():
    assert store_bytes(1, PRO) == 1024 + 256 + 2 * 584
    assert query_bytes(2, PRO) == 2 * (2 * 128 * 1024 + 256)


def test_other_sizes_are_refused():
    inputs = Case("bad", Shapes(256, 128, 2, 72, 8, *(1,) * 5, 4, 1, 1.0, 1.0), ((0, 1),)).queries(7)
    with pytest.raises(ValueError, match=r"q is \[1, 2, 72\]; expected neighbouring heads of a power of two dims"):
        prepare_q(**inputs)
    inputs = DEMOS[1].make(8)
    with pytest.raises(
        ValueError, match="96 dims, 64 of them rotated; the Triton kernels take multiples of 64 up to 512"
    ):
        store_kv(**inputs | {"latent_kv": torch.empty(1, 96)})
