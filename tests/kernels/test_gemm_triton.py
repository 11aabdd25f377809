"""Products with weights in Triton against the references, by the interpreter on the CPU."""

import itertools

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel

from dsv4_kernels.arrival import counters
from dsv4_kernels.benching import relative_error
from dsv4_kernels.cases import DEMO, PRO, generator, matrix, nonzero
from dsv4_kernels.gemm import device as gemm_device
from dsv4_kernels.gemm import library, quantize
from dsv4_kernels.gemm.bench import floor_bytes, flops
from dsv4_kernels.gemm.cases import products
from dsv4_kernels.gemm.fp8 import Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.pair import linear_pair
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.gemm.reference import linear
from dsv4_kernels.gemm.triton import Tiles, grouped_fp8_out, linear_bf16, linear_fp8, tiles_for
from dsv4_kernels.mhc.cases import Case
from dsv4_kernels.mhc.triton import mhc_boundary
from dsv4_kernels.norm.triton import rms_norm_fp8
from dsv4_kernels.quant import dequantize_fp8_blocks, quantize_fp8, quantize_fp8_blocks

# Relative norm; sums in another order decide a bfloat16 rounding now and then.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
SIZES = [(0, 128, 128), (1, 256, 512), (5, 200, 1280), (17, 384, 256), (70, 130, 384), (130, 128, 128)]  # T, N, K


def weight_of(num_rows, depth, seed=1):
    """A weight whose blocks differ in size by orders of magnitude, and its values."""
    random = generator(seed)
    values = matrix(random, num_rows, depth) * 10.0 ** (torch.rand(1, depth // 128, generator=random) * 4 - 2).repeat(
        1, 128
    )
    weight = Fp8Weight.from_checkpoint(*quantize_fp8_blocks(values))
    return weight, dequantize_fp8_blocks(weight.codes, weight.exponents)


def rows_of(num_tokens, depth, seed=2):
    return nonzero(generator(seed), num_tokens, depth, scale=3.0).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_tokens", "depth"), [(0, 128), (1, 128), (5, 1280), (33, 3072)])
def test_quantised_rows_have_the_bits_of_the_reference(num_tokens, depth, dtype):
    random = generator(3)
    x = nonzero(random, num_tokens, depth) * 10.0 ** (torch.rand(num_tokens, 1, generator=random) * 12 - 8)
    x = x.to(dtype)
    x[:, :128] = 0
    rows = quantize_rows(torch.cat([x, x], dim=1)[:, depth:])  # columns of a larger matrix
    codes, exponents = quantize_fp8(x, 128)
    assert torch.equal(rows.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(rows.exponents, exponents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_tokens", "num_rows", "depth"), SIZES)
def test_fp8_product_equals_the_reference(num_tokens, num_rows, depth, dtype):
    weight, values = weight_of(num_rows, depth)
    x = rows_of(num_tokens, depth)
    expected = linear(x, values, quantize=True, out_dtype=dtype)
    found = linear_fp8(quantize_rows(x), weight, out_dtype=dtype)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    assert num_tokens == 0 or relative_error(found, expected) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_tokens", "num_rows", "depth"), [*SIZES, (3, 140, 2624)])
def test_bf16_product_equals_the_reference(num_tokens, num_rows, depth, dtype):
    weight = matrix(generator(1), num_rows, depth).bfloat16()
    x = rows_of(num_tokens, 2 * depth)[:, depth:]
    expected = linear(x, weight, out_dtype=dtype)
    found = linear_bf16(x, weight, out_dtype=dtype)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    assert num_tokens == 0 or relative_error(found, expected) <= BOUND[dtype]


@pytest.mark.parametrize("num_tokens", [5, 70])
def test_scales_applied_by_the_tensor_core_give_the_product(num_tokens, monkeypatch):
    monkeypatch.setattr(gemm_device, "cuda_capability_geq", lambda major: major <= 10)  # as on GB300
    weight, values = weight_of(200, 640)
    x = rows_of(num_tokens, 640)
    found = linear_fp8(quantize_rows(x), weight, out_dtype=torch.float32)
    assert relative_error(found, linear(x, values, quantize=True, out_dtype=torch.float32)) <= BOUND[torch.float32]


@pytest.mark.parametrize("num_tokens", [1, 20])
@pytest.mark.parametrize("splits", [1, 2, 3, 4, 7])
def test_the_parts_of_a_split_product_are_added_in_their_order(splits, num_tokens):
    weight, values = weight_of(200, 1280)  # 10 blocks: 3 and 4 do not divide them, of 7 splits two have none
    x = rows_of(num_tokens, 1280)
    found = linear_fp8(quantize_rows(x), weight, out_dtype=torch.float32, tiles=Tiles(16, splits, 4, 3))
    total = torch.zeros_like(found)
    size = -(-10 // splits)
    for first in range(0, 10, size):
        blocks, columns = slice(first, first + size), slice(first * 128, (first + size) * 128)
        part = Fp8Weight(weight.codes[:, columns].contiguous(), weight.exponents[:, blocks].contiguous())
        total += linear_fp8(quantize_rows(x[:, columns]), part, out_dtype=torch.float32, tiles=Tiles(16, 1, 4, 3))
    assert torch.equal(found, total)
    assert relative_error(found, linear(x, values, quantize=True, out_dtype=torch.float32)) <= BOUND[torch.float32]
    assert not counters(x.device, 4).any()


@pytest.mark.parametrize("tiles", [Tiles(16, 1, 4, 3), Tiles(16, 3, 4, 3), Tiles(32, 2, 4, 3)])
def test_a_row_has_the_same_bits_alone_and_in_a_batch_of_the_same_tiles(tiles):
    weight, _ = weight_of(256, 1024)
    x = rows_of(40, 1024)
    together = linear_fp8(quantize_rows(x), weight, out_dtype=torch.float32, tiles=tiles)
    alone = linear_fp8(quantize_rows(x[21:22]), weight, out_dtype=torch.float32, tiles=tiles)
    assert torch.equal(together[21:22], alone)


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 8, 9, 33, 70])
def test_two_products_in_one_launch_have_the_bits_of_two_launches(num_tokens):
    """And few tokens have the norm of the first of them."""
    weight, _ = weight_of(400, 1536)
    x, matrix = rows_of(num_tokens, 1536), rows_of(300, 1536, seed=3)
    norm = torch.rand(256, generator=generator(4)) + 0.5
    rows = quantize_rows(x)
    for multiply, given in itertools.product((linear_pair, library.linear_pair), (matrix, None)):
        found_fp8, found, normed = multiply(rows, weight, x, given, norm, 1e-6)
        assert torch.equal(found_fp8, linear_fp8(rows, weight))
        assert found is None if given is None else torch.equal(found, linear_bf16(x, given))
        assert (normed is not None) == (0 < num_tokens <= 8)
        if normed is not None:
            expected = rms_norm_fp8(found_fp8[:, :256], norm, 1e-6)
            assert torch.equal(normed.codes.view(torch.uint8), expected.codes.view(torch.uint8))
            assert torch.equal(normed.exponents, expected.exponents)
    assert not counters(x.device, 8).any()


def test_two_products_need_the_same_rows():
    weight, _ = weight_of(128, 128)
    with pytest.raises(ValueError, match=r"x_fp8 is \[3, 128\], x \[2, 128\]; expected one shape"):
        linear_pair(quantize_rows(rows_of(3, 128)), weight, rows_of(2, 128), rows_of(4, 128), torch.ones(128), 1e-6)


def test_nan_in_one_row_stays_there():
    weight, _ = weight_of(128, 256)
    x = rows_of(3, 256)
    x[1, 200] = torch.nan
    found = linear_fp8(quantize_rows(x), weight)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_one_product_over_a_stack_equals_two():
    parts = [weight_of(rows, 256, seed)[0] for rows, seed in ((256, 4), (130, 5))]
    x = quantize_rows(rows_of(3, 256))
    stack = Fp8Weight.stack(parts)
    tiles = Tiles(16, 1, 4, 3)
    together = linear_fp8(x, stack, tiles=tiles)
    assert torch.equal(together, torch.cat([linear_fp8(x, part, tiles=tiles) for part in parts], dim=1))
    assert torch.equal(together[:, :256], linear_fp8(x, stack.first_rows(256), tiles=tiles))
    with pytest.raises(ValueError, match="weight 0 has 130 rows; expected a multiple of 128"):
        Fp8Weight.stack(parts[::-1])


def test_float_scales_are_powers_of_two_or_an_error():
    weight, _ = weight_of(200, 256)
    scale = (weight.exponents.int() << 23).view(torch.float32)
    again = Fp8Weight.from_checkpoint(weight.codes, scale)
    assert torch.equal(again.exponents, weight.exponents)
    assert torch.equal(
        Fp8Weight.from_checkpoint(weight.codes, scale.to(torch.float8_e8m0fnu)).exponents, weight.exponents
    )
    for bad in (448.0 / 300, 0.0, -2.0, torch.inf, torch.nan):
        scale[1, 0] = bad
        with pytest.raises(ValueError, match=r"scale of block \(1, 0\) is .*; allowed are powers of two"):
            Fp8Weight.from_checkpoint(weight.codes, scale)
    with pytest.raises(ValueError, match="scales travel as E8M0 bytes, so that each is a power of two"):
        Fp8Weight(weight.codes, scale)
    with pytest.raises(ValueError, match="scales travel as E8M0 bytes"):
        Fp8Rows(weight.codes, torch.ones(200, 2))


def test_shapes_that_do_not_fit_are_named():
    weight, _ = weight_of(128, 256)
    with pytest.raises(ValueError, match=r"x is \[2, 128\].* K = 256"):
        linear_fp8(quantize_rows(rows_of(2, 128)), weight)
    with pytest.raises(ValueError, match=r"x is torch\.float32"):
        linear_bf16(torch.ones(2, 128), torch.ones(4, 128, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"exponents \[1, 1\]; expected K a multiple of 128"):
        Fp8Weight(weight.codes, weight.exponents[:, :1])
    with pytest.raises(ValueError, match=r"x is \[2, 100\].*multiple of 128"):
        quantize_rows(torch.ones(2, 100))


def test_few_tokens_are_split_until_every_multiprocessor_has_work():
    assert tiles_for(1, 2048, 7168, "fp8").splits == 8  # 16 tiles of rows
    assert tiles_for(64, 65536, 1536, "fp8").splits == 1
    assert tiles_for(1, 128, 1024, "fp8").splits == 2  # no fewer than 512 of K each
    assert tiles_for(65, 2048, 7168, "fp8").splits == 1
    assert [tiles_for(n, 16384, 4096, "wide").splits for n in (1, 17, 65)] == [2, 2, 1]  # two on a multiprocessor
    assert [tiles_for(n, 8192, 4096, "wide").splits for n in (16, 17)] == [4, 2]


def test_the_floor_of_a_pro_decode_step():
    latent = next(product for product in products(PRO) if product.name == "wq_a+wkv")
    assert latent[1:] == (2048, 7168, True)
    assert floor_bytes(latent, 1) == 2048 * 7168 + 7168 + 16 * 56 + 56 + 4096  # the weight is 99.9 % of it
    assert flops(latent, 3) == 6 * 2048 * 7168
    raw = next(product for product in products(PRO) if product.name == "raw")
    assert floor_bytes(raw, 1) == 2 * 2624 * 7168 + 2 * 7168 + 4 * 2624


@pytest.mark.parametrize(("num_rows", "depth"), [(128, 128), (200, 1280), (384, 2176)])
def test_the_library_gets_the_values_and_scales_of_the_weight(num_rows, depth):
    weight, values = weight_of(num_rows, depth)
    assert torch.equal(library.bf16_values(weight).float(), values)
    scales = weight.float_scales.t()
    assert scales.stride(0) % 4 == 0
    expected = 2.0 ** (weight.exponents.float() - 127)
    assert torch.equal(scales[:, : depth // 128], expected)


@pytest.mark.parametrize(("num_tokens", "depth"), [(1, 128), (52, 2176)])
def test_the_library_gets_the_scales_of_the_rows(num_tokens, depth):
    rows = quantize_rows(rows_of(num_tokens, depth))
    scales = library.float_scales(rows)
    assert scales.stride(0) == 1
    assert torch.equal(scales, 2.0 ** (rows.exponents.float() - 127))


def test_products_on_a_cpu_are_ours():
    weight, _ = weight_of(128, 256)
    x = rows_of(64, 256)
    assert torch.equal(library.linear_fp8(quantize_rows(x), weight), linear_fp8(quantize_rows(x), weight))
    matrix = x[:3].contiguous()
    assert torch.equal(library.linear_bf16(x, matrix), linear_bf16(x, matrix))


def test_who_makes_rows_for_the_library_writes_their_scales(monkeypatch):
    """As many rows as the library takes: norm, hyper-connection and first output product, without another launch."""
    monkeypatch.setattr(quantize, "is_for_library", lambda num_tokens, device: True)
    x, weight = rows_of(4, 512), weight_of(256, 256)[0]
    boundary = Case("few", 4, DEMO).make(0, torch.bfloat16)
    made = [
        rms_norm_fp8(x, None, 1e-6),
        mhc_boundary(norm=torch.ones(DEMO.hidden_size), **boundary)[2],
        grouped_fp8_out(x, weight, 2),
        grouped_fp8_out(x, weight, 2, tiles=Tiles(16, 2, 4, 3)),
    ]
    for rows in made:
        assert rows.scales.stride() == rows.exponents.stride()
        assert torch.equal(rows.scales, 2.0 ** (rows.exponents.float() - 127))
        assert library.float_scales(rows) is rows.scales
    assert quantize_rows(x).scales is None
