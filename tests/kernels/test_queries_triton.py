"""The product that makes the queries of few rows, with all that shares its launch, against a launch for each."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from triton.runtime import interpreter

from dsv4_kernels.arrival import counters
from dsv4_kernels.cases import generator, nonzero
from dsv4_kernels.compressor.cases import Case
from dsv4_kernels.gemm import pair
from dsv4_kernels.gemm.cases import LayerRows
from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.gemm.quantize import empty_rows
from dsv4_kernels.metadata import C4, C128
from dsv4_kernels.quant.reference import quantize_fp8_blocks

HEADS, DIM, DEPTH = 2, 512, 1536
STEPS = (
    Case("one", (7,), (1,)),
    Case("decodes", (0, 3, 126, 127, 511), (1,) * 5, num_padding=2),
    Case("verifies", (2, 253), (4, 3)),
    Case("chunk", (124,), (8,)),
)


def weight_of(index_rows):
    values = nonzero(generator(1), HEADS * DIM + index_rows, DEPTH)
    return Fp8Weight.from_checkpoint(*quantize_fp8_blocks(values))


def layer(ratio, step, index_heads=2, index_dim=128):
    index_rows = index_heads * index_dim if ratio == C4 else 0
    return LayerRows(ratio, step, weight_of(index_rows), HEADS, index_heads, 1)


def kept(rows, ratio):
    """Rings or states, entries, and window rows."""
    own = [each["ring" if ratio == C4 else "state"] for each in rows.made]
    planes = [plane for each in rows.made for plane in each["planes"]]
    return [*own, *planes, *rows.arguments["step_planes"], *rows.arguments["ring_planes"]]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize("ratio", [0, C4, C128])
def test_one_launch_has_the_bits_of_a_launch_each(ratio, step):
    """But for C128's states, to which a chunk's rows are added four at a time here and sixteen there."""
    real = sum(step.counts)
    together, apart = layer(ratio, step), layer(ratio, step)
    found, expected = together.together(together.norm()), apart.apart()
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert_same(one[:real], other[:real])
    for one, other in zip(kept(together, ratio), kept(apart, ratio), strict=True):
        if ratio == C128 and step.name == "chunk" and one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
        else:
            assert_same(one, other)
    assert not counters(found[0].device, HEADS).any()


@pytest.mark.parametrize(("index_heads", "index_dim"), [(3, 64), (4, 32), (1, 32)])
def test_index_heads_may_share_a_tile_and_leave_some_of_it(index_heads, index_dim):
    rows = [layer(C4, STEPS[1], index_heads, index_dim) for _ in range(2)]
    for one, other in zip(rows[0].together(rows[0].norm()), rows[1].apart(), strict=True):
        assert_same(one[:5], other[:5])


def test_padding_rows_of_index_queries_are_not_written(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **settings: empty(*size, **settings).fill_(77))
    rows, other = layer(C4, STEPS[1]), layer(C4, STEPS[1])
    _, index_q, weights = rows.together(rows.norm())
    assert (index_q[5:] == 77).all()
    assert (weights[5:] == 77).all()
    queries = other.apart()
    assert_same(index_q[:5], queries[1][:5])


def test_the_order_of_the_programs_does_not_matter(monkeypatch):
    forward, backward = layer(C4, STEPS[2]), layer(C4, STEPS[2])
    expected = forward.together(forward.norm())
    original, normed = interpreter.InterpreterBuilder.set_grid_idx, backward.norm()
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "set_grid_idx",
        lambda self, x, y, z: original(self, self.grid_dim[0] - 1 - x, y, z),
    )
    for found, other in zip(backward.together(normed), expected, strict=True):
        assert_same(found, other)
    for found, other in zip(kept(backward, C4), kept(forward, C4), strict=True):
        assert_same(found, other)


def test_what_the_launch_does_not_take_is_refused():
    rows = layer(C4, STEPS[0])
    with pytest.raises(ValueError, match=r"make_queries: 9 rows, a weight of 1280 rows .*; expected 1 to 8 rows"):
        rows.together(empty_rows(pair.FEW + 1, DEPTH, "cpu"))
    rows.num_heads = 3
    with pytest.raises(ValueError, match="for 3 heads of 512 dims and 2 index heads; expected"):
        rows.together(rows.norm())
