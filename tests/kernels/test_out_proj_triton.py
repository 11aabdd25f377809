"""The Triton output projection against the reference, by the interpreter on the CPU."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel

from dsv4_kernels.arrival import counters
from dsv4_kernels.benching import relative_error
from dsv4_kernels.cases import PRO, generator, matrix, nonzero
from dsv4_kernels.gemm import device as gemm_device
from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.gemm.triton import Tiles, grouped_fp8_out
from dsv4_kernels.out_proj import reference
from dsv4_kernels.out_proj.bench import floor_bytes, flops
from dsv4_kernels.out_proj.triton import grouped_out_proj
from dsv4_kernels.quant import dequantize_fp8, dequantize_fp8_blocks, quantize_fp8_blocks

# A value at the edge of two codes may round either way after another order of sums.
BOUND = 3e-3
HIDDEN, GROUPS, RANK, HEADS, HEAD_DIM = 384, 3, 256, 6, 128


def make(num_tokens, groups=GROUPS, rank=RANK):
    random = generator(1)
    width = HEADS // groups * HEAD_DIM
    wo_a, wo_b = (
        Fp8Weight.from_checkpoint(*quantize_fp8_blocks(matrix(random, *shape)))
        for shape in ((groups * rank, width), (HIDDEN, groups * rank))
    )
    return nonzero(random, num_tokens, HEADS, HEAD_DIM).bfloat16(), wo_a, wo_b


def values_of(weight):
    return dequantize_fp8_blocks(weight.codes, weight.exponents)


@pytest.mark.parametrize(("groups", "rank"), [(GROUPS, RANK), (2, 64), (1, 128)])  # 64: the demo model
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 33, 70, 140])
def test_equals_the_reference(num_tokens, groups, rank):
    o, wo_a, wo_b = make(num_tokens, groups, rank)
    expected = reference.grouped_out_proj(
        o, values_of(wo_a).unflatten(0, (groups, rank)), values_of(wo_b), quantize=True
    )
    found = grouped_out_proj(o, wo_a, wo_b)
    assert (found.shape, found.dtype) == (expected.shape, torch.bfloat16)
    assert num_tokens == 0 or relative_error(found, expected) <= BOUND


@pytest.mark.parametrize(("groups", "rank"), [(GROUPS, RANK), (6, 64)])  # 64: two tiles share 128 quantised rows
@pytest.mark.parametrize(
    "tiles", [Tiles(16, 1, 4, 3), Tiles(16, 2, 4, 3), Tiles(32, 3, 4, 3), Tiles(64, 1, 4, 3), Tiles(128, 1, 8, 3)]
)
def test_low_rank_rows_are_quantised_where_they_are_made(tiles, groups, rank):
    o, wo_a, _ = make(20, groups, rank)
    rows = grouped_fp8_out(o.flatten(1), wo_a, groups, tiles=tiles)
    grouped = o.double().reshape(20, groups, -1)
    low = torch.einsum("tgk,gnk->tgn", grouped, values_of(wo_a).double().unflatten(0, (groups, rank))).flatten(1)
    expected = reference.linear(low.bfloat16(), torch.eye(groups * rank), quantize=True)
    assert relative_error(dequantize_fp8(rows.codes, rows.exponents, 128), expected) <= BOUND
    assert not counters(o.device, 12).any()


@pytest.mark.parametrize(("groups", "rank", "splits"), [(GROUPS, RANK, 2), (6, 64, 1), (6, 64, 2)])
def test_only_the_last_of_all_that_share_128_rows_adds_them(groups, rank, splits, monkeypatch):
    added, add = [], gemm_device._add
    monkeypatch.setattr(gemm_device, "_add", lambda *args: (added.append(args), add(*args)))
    o, wo_a, _ = make(20, groups, rank)
    grouped_fp8_out(o.flatten(1), wo_a, groups, tiles=Tiles(16, splits, 4, 3))
    assert len(added) == groups * rank // 128 * 2  # tiles of tokens


@pytest.mark.parametrize(("groups", "rank"), [(GROUPS, RANK), (6, 64)])
def test_a_row_has_the_same_bits_alone_and_in_a_batch_of_the_same_tiles(groups, rank):
    o, wo_a, wo_b = make(20, groups, rank)
    tiles = Tiles(16, 2, 4, 3)
    together = grouped_out_proj(o, wo_a, wo_b, tiles=tiles)
    assert torch.equal(together[13:14], grouped_out_proj(o[13:14], wo_a, wo_b, tiles=tiles))


def test_nan_in_one_row_stays_there():
    o, wo_a, wo_b = make(3)
    o[1, 2, 3] = torch.nan
    found = grouped_out_proj(o, wo_a, wo_b)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_shapes_that_do_not_fit_are_named():
    o, wo_a, wo_b = make(2)
    with pytest.raises(ValueError, match=r"o is \[2, 5, 128\].* has K = 256"):
        grouped_out_proj(o[:, :5].contiguous(), wo_a, wo_b)
    with pytest.raises(ValueError, match="weight has 768 rows; expected a multiple of 128, 5 times one of 64"):
        grouped_fp8_out(torch.ones(2, 1280, dtype=torch.bfloat16), wo_a, 5)


def test_the_floor_of_a_pro_decode_step():
    first, both = floor_bytes(PRO, 1)
    assert first == 16384 * 4096 + 16384 * 4096 // 16384 + 2 * 65536 + 16384 + 128
    assert both - first == 7168 * 16384 + 7168 + 16384 + 128 + 2 * 7168
    assert flops(PRO, 1) == (2 * 16384 * 4096, 2 * 16384 * (4096 + 7168))
