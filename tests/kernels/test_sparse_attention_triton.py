"""The Triton sparse attention against the reference over the engine's tables, by the interpreter on the CPU."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel

from dsv4_kernels.cases import FLASH, PRO, Shapes
from dsv4_kernels.sparse_attention.bench import flops, moved_bytes
from dsv4_kernels.sparse_attention.cases import CASES, Case
from dsv4_kernels.sparse_attention.triton import default_splits, sparse_attention

BOUND = 3e-3  # relative norm: weights are rounded to bf16 on another maximum than the reference's, results once more
MIXED = ((0, 1), (0, 3), (20_000, 1), (127, 2), (130, 1), (300, 5))


def shapes(heads, dim):
    return Shapes(256, 128, heads, dim, 64, *(1,) * 5, 4, 1, 1.0, 1.0)


def poison_like(q):
    return torch.full(q.shape, 7.0, dtype=q.dtype)


def assert_equals_reference(case, seed=0, **arguments):
    inputs = case.make(seed)
    out = poison_like(inputs["q"])
    assert sparse_attention(**inputs, out=out, **arguments) is out
    expected = case.reference(inputs)
    found = out[: case.num_tokens]
    assert found.isfinite().all()
    assert (found.double() - expected.double()).norm() <= BOUND * expected.double().norm()
    assert (out[case.num_tokens :] == 7.0).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("demo", "one")], ids=lambda c: c.name)
def test_named_cases_equal_the_reference(case):
    assert_equals_reference(case)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(("ratio", "top_k"), [(0, 0), (4, 70), (4, 0), (128, 0)])
def test_every_kind_of_layer_equals_the_reference(ratio, top_k, num_splits, turned):
    requests = MIXED if ratio != 4 or top_k else MIXED[:2] + MIXED[3:]  # 5,000 entries take the interpreter seconds
    case = Case("random", shapes(8, 128), requests, num_padding=2, num_drafts=3, ratio=ratio, top_k=top_k)
    assert_equals_reference(case, num_splits=num_splits, turned=turned)


@pytest.mark.parametrize(("heads", "dim"), [(128, 512), (80, 128), (17, 256)])
def test_other_sizes_of_heads_equal_the_reference(heads, dim):
    assert_equals_reference(Case("heads", shapes(heads, dim), ((131, 2),), num_padding=1, ratio=4, top_k=40))


def test_a_window_that_is_no_multiple_of_a_block():
    assert_equals_reference(Case("window", shapes(8, 128), ((0, 4), (200, 3)), ratio=128, window=77))


def test_a_chunk_longer_than_the_ring_reads_the_ring_as_it_was():
    assert_equals_reference(Case("chunk", shapes(4, 128), ((100, 40), (9, 1)), window=16, num_drafts=3))


def test_splits_beyond_the_keys_add_nothing():
    case = Case("splits", shapes(8, 128), ((0, 2), (500, 1)), num_padding=1, ratio=4, top_k=64)
    assert_equals_reference(case, num_splits=11)


def test_the_number_of_splits_changes_no_key():
    """One key outweighs the others wherever it lies, so a key that a split left out or took twice would show."""
    case = Case("splits", shapes(8, 128), ((600, 1),), ratio=4)
    inputs = case.make(3)
    once = sparse_attention(**inputs, num_splits=1)
    for num_splits in range(2, 7):
        found = sparse_attention(**inputs, num_splits=num_splits)
        assert (found.double() - once.double()).norm() <= BOUND * once.double().norm()


def test_a_row_has_the_same_bits_alone_and_in_a_step_of_the_same_splits():
    case = Case("alone", shapes(8, 128), ((40, 1), (300, 2)), ratio=4, top_k=64)
    inputs = case.make(5)
    together = sparse_attention(**inputs, num_splits=2)
    alone = Case("alone", shapes(8, 128), ((40, 1),)).rows()
    alone.slots.copy_(inputs["rows"].slots[:1])
    one = {key: inputs[key][:1] for key in ("q", "rotations", "chosen")} | {"rows": alone}
    assert torch.equal(sparse_attention(**inputs | one, num_splits=2), together[:1])


@pytest.mark.parametrize("num_splits", [1, 2])
def test_nan_stays_in_its_row(num_splits):
    case = Case("nan", shapes(8, 128), ((60, 1), (300, 2)), ratio=4, top_k=64)
    inputs = case.make(6)
    inputs["q"][1, 3, 5] = torch.nan
    out = sparse_attention(**inputs, num_splits=num_splits)
    assert out[1, 3].isnan().all()
    assert out[[0, 2]].isfinite().all()
    assert out[1, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("sink", [-torch.inf, 1e4])
def test_extreme_sinks(sink):
    case = Case("sink", shapes(8, 128), ((3, 2),), ratio=4)
    inputs = case.make(7)
    inputs["sink"][:4] = sink
    found, expected = sparse_attention(**inputs, num_splits=2), case.reference(inputs)
    assert (found.double() - expected.double()).norm() <= BOUND * expected.double().norm()


def test_zero_rows():
    inputs = CASES[-1].make(0)
    assert sparse_attention(**inputs).shape == (0, 8, 128)


def test_queries_may_be_rows_of_a_longer_projection():
    case = Case("strided", shapes(8, 128), ((50, 2),))
    inputs = case.make(8)
    wide = torch.cat([inputs["q"], inputs["q"][:, :1]], dim=1)
    assert torch.equal(sparse_attention(**inputs | {"q": wide[:, :8]}), sparse_attention(**inputs))


def test_wrong_arguments_are_refused():
    inputs = CASES[-1].make(0)
    with pytest.raises(ValueError, match=r"q is \[0, 8, 96\].* 128, 256 or 512 dims"):
        sparse_attention(**inputs | {"q": torch.empty(0, 8, 96)})
    with pytest.raises(ValueError, match="ratio 4 needs entry_planes and page_table"):
        sparse_attention(**inputs, ratio=4)


def test_the_floor_of_a_pro_decode_step_and_of_a_chunk():
    decode = Case("pro", PRO, ((8191, 1),), ratio=4, top_k=1024)
    assert flops(decode) == 4 * 128 * 512 * (128 + 1024)
    assert moved_bytes(decode) == 4 * 128 * 512 + 4 * 1024 + (128 + 1024) * 584
    chunk = Case("flash", FLASH, ((8192, 2048),), ratio=128)
    visible = sum((position + 1) // 128 for position in range(8192, 8192 + 2048))
    assert flops(chunk) == 4 * 64 * 512 * (2048 * 128 + visible)
    assert moved_bytes(chunk) == 2048 * 4 * 64 * 512 + (127 + 2048 + 80) * 584


def test_splits_fill_a_gpu_from_shapes_alone():
    assert default_splits(1, 128, 128 + 1024) == 18  # one block each
    assert default_splits(16, 128, 128 + 1024) == 4
    assert default_splits(256, 64, 128 + 1024) == 1
    assert default_splits(0, 64, 256) == 4
    assert default_splits(1, 128, 128 + 64) == 1  # too few to be worth a launch that adds them
