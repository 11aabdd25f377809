"""Sparse attention on a GPU against the reference over the engine's tables, at the shapes of the released models.

`specialized` None is the kernel that the engine takes, False the Triton one, True that of Hopper."""

import pytest
import torch

from dsv4_kernels.benching import relative_error
from dsv4_kernels.capability import is_hopper
from dsv4_kernels.cases import FLASH, PRO
from dsv4_kernels.metadata.rows import Rows
from dsv4_kernels.sparse_attention.cases import CASES, Case
from dsv4_kernels.sparse_attention.triton import sparse_attention

BOUND = 3e-3  # relative norm: weights are rounded to bf16 on another maximum than the reference's, results once more
NAMED = [case for case in CASES if case.requests]
DECODE = [
    Case("pro", PRO, ((70_000, 2), (3, 1)), num_padding=1, ratio=4, top_k=1024, num_drafts=3),
    Case("pro-c128", PRO, ((200_000, 1),), ratio=128),
    Case("flash", FLASH, ((9_000, 1), (127, 1)), ratio=4, top_k=512),
    Case("flash-window", FLASH, ((9_000, 1), (127, 1)), num_padding=1),
]


@pytest.fixture
def hopper():
    if not is_hopper(torch.device("cuda", 0)):
        pytest.skip("a kernel of Hopper")


def assert_equals_reference(case, **arguments):
    inputs = case.make(0, "cuda")
    out = torch.full_like(inputs["q"], 7.0)
    sparse_attention(**inputs, out=out, **arguments)
    assert relative_error(out[: case.num_tokens], case.reference(inputs)) <= BOUND
    assert (out[case.num_tokens :] == 7.0).all()


@pytest.mark.parametrize("case", NAMED + DECODE, ids=lambda case: f"{case.name}-{case.num_tokens}")
def test_equals_the_reference(case):
    assert_equals_reference(case, specialized=False)


@pytest.mark.parametrize("num_splits", [None, 1, 5, 40])
@pytest.mark.parametrize("case", [case for case in NAMED + DECODE if case.shapes.head_dim == 512], ids=lambda c: c.name)
def test_warps_with_roles_equal_the_reference(hopper, case, num_splits):
    assert_equals_reference(case, num_splits=num_splits, specialized=True)


def test_warps_with_roles_have_the_same_bits_each_time(hopper):
    """Whoever is ahead: what a role reads was written before, and is not written until it was read."""
    inputs = Case("pro", PRO, ((8_192, 256),), ratio=4, top_k=1024).make(3, "cuda")
    first = sparse_attention(**inputs)  # which is this kernel
    for _ in range(20):
        assert torch.equal(sparse_attention(**inputs, specialized=True), first)


@pytest.mark.parametrize("num_splits", [1, 5, 40])
def test_any_number_of_splits_equals_the_reference(num_splits):
    assert_equals_reference(DECODE[0], num_splits=num_splits, specialized=False)


def test_dims_as_rows_of_the_value_product_equal_the_reference():
    """What GB300 does, on any GPU."""
    assert_equals_reference(DECODE[2], turned=True, specialized=False)


@pytest.mark.parametrize("specialized", [None, False])
def test_a_row_has_the_same_bits_alone_and_in_a_step_of_the_same_splits(specialized):
    case = DECODE[0]
    inputs = case.make(1, "cuda")
    rows = inputs["rows"]
    one = {key: inputs[key][2:3] for key in ("q", "rotations", "chosen")}
    one["rows"] = Rows(rows.slots[2:3], rows.positions[2:3], torch.zeros_like(rows.firsts[2:3]), rows.counts[2:3])
    one["step_planes"] = tuple(plane[2:3] for plane in inputs["step_planes"])
    for num_splits in (1, 4):
        how = {"num_splits": num_splits, "specialized": specialized}
        together = sparse_attention(**inputs, **how)
        assert torch.equal(sparse_attention(**inputs | one, **how), together[2:3])


@pytest.mark.parametrize("specialized", [None, False])
def test_a_captured_graph_follows_its_rows(specialized):
    """Positions and slots are read on the device alone: a replay on other ones equals a fresh call."""
    case = Case("pro", PRO, ((9_000, 1), (300, 1)), ratio=4, top_k=1024)
    inputs = case.make(2, "cuda")
    out = torch.empty_like(inputs["q"])
    sparse_attention(**inputs, out=out, specialized=specialized)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse_attention(**inputs, out=out, specialized=specialized)
    for key in ("slots", "positions"):
        values = getattr(inputs["rows"], key)
        values.copy_(values.flip(0))
    inputs["chosen"].copy_(inputs["chosen"].flip(0))
    graph.replay()
    found = out.clone()
    sparse_attention(**inputs, out=out, specialized=specialized)
    assert torch.equal(found, out)
    assert found.isfinite().all()
