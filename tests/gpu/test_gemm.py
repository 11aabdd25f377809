"""Products with weights on a GPU against the references, at the shapes of the released models."""

import pytest
import torch

from dsv4_kernels.arrival import counters
from dsv4_kernels.benching import relative_error
from dsv4_kernels.cases import DEMO, FLASH, PRO
from dsv4_kernels.gemm import library, quantize
from dsv4_kernels.gemm.cases import products
from dsv4_kernels.gemm.pair import linear_pair
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.gemm.reference import linear
from dsv4_kernels.gemm.triton import Tiles, linear_bf16, linear_fp8
from dsv4_kernels.norm.triton import rms_norm_fp8
from dsv4_kernels.quant import dequantize_fp8_blocks, quantize_fp8

# Relative norm. Float32 results of FP8: a tensor core of Hopper adds 128 products with 14 bits.
BOUND_BF16, BOUND_FP8, BOUND_FLOAT32 = 2e-3, 1e-3, 1e-5
TOKENS = [1, 17, 64, 65, 300]
ALL = [
    (name, product) for name, shapes in (("pro", PRO), ("flash", FLASH), ("demo", DEMO)) for product in products(shapes)
]
FP8, BF16 = ([pair for pair in ALL if pair[1].fp8 is fp8] for fp8 in (True, False))


def ids(value):
    return value if isinstance(value, str) else getattr(value, "name", None)


@pytest.mark.parametrize("num_tokens", [0, 1, 17, 300])
def test_quantised_rows_have_the_bits_of_the_reference(num_tokens):
    x = (torch.randn(num_tokens, PRO.hidden_size, device="cuda") * 10.0).bfloat16()
    x *= 10.0 ** (torch.rand(num_tokens, 1, device="cuda") * 12 - 8).bfloat16()
    rows, (codes, exponents) = quantize_rows(x), quantize_fp8(x, 128)
    assert torch.equal(rows.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(rows.exponents, exponents)


@pytest.mark.parametrize(("name", "product"), FP8, ids=ids)
def test_fp8_product_equals_the_reference(name, product):
    x, weight = product.make(max(TOKENS), 1, "cuda")
    expected = linear(x, dequantize_fp8_blocks(weight.codes, weight.exponents), quantize=True, out_dtype=torch.float32)
    for num_tokens in TOKENS:
        rows = quantize_rows(x[:num_tokens])
        found = linear_fp8(rows, weight, out_dtype=torch.float32)
        assert relative_error(found, expected[:num_tokens]) <= BOUND_FP8, num_tokens
        found = linear_fp8(rows, weight)
        assert found.dtype == torch.bfloat16
        assert relative_error(found, expected[:num_tokens].bfloat16()) <= BOUND_BF16, num_tokens


@pytest.mark.parametrize(("name", "product"), ALL, ids=ids)
def test_the_library_computes_the_same_product(name, product):
    x, weight = product.make(2 * quantize.LEAST_TOKENS, 1, "cuda")
    assert library.is_for_library(x)
    assert not library.is_for_library(x[:-1])
    if product.fp8:
        rows = quantize_rows(x)
        expected = linear(x, dequantize_fp8_blocks(weight.codes, weight.exponents), quantize=True)
        assert relative_error(library.linear_fp8(rows, weight), expected) <= BOUND_BF16
    else:
        expected = linear(x, weight, out_dtype=torch.float32)
        assert relative_error(library.linear_bf16(x, weight), expected) <= BOUND_FLOAT32


@pytest.mark.parametrize(("name", "product"), BF16, ids=ids)
def test_bf16_product_is_a_float32_product(name, product):
    x, weight = product.make(max(TOKENS), 2, "cuda")
    expected = linear(x, weight, out_dtype=torch.float32)
    for num_tokens in TOKENS:
        found = linear_bf16(x[:num_tokens], weight)
        assert found.dtype == torch.float32
        assert relative_error(found, expected[:num_tokens]) <= BOUND_FLOAT32, num_tokens


def test_repeated_and_batched_products_have_the_same_bits():
    x, weight = FP8[0][1].make(64, 3, "cuda")
    first = linear_fp8(quantize_rows(x), weight)
    assert all(torch.equal(first, linear_fp8(quantize_rows(x), weight)) for _ in range(20))
    assert not counters(x.device, 1).any()
    tiles = Tiles(64, 8, 8, 4)
    together = linear_fp8(quantize_rows(x), weight, tiles=tiles)
    assert torch.equal(together[21:22], linear_fp8(quantize_rows(x[21:22]), weight, tiles=tiles))


@pytest.mark.parametrize("num_tokens", [1, 8, 16, 33, 64])
def test_two_products_in_one_launch_have_the_bits_of_two_launches(num_tokens):
    x, weight = FP8[0][1].make(num_tokens, 5, "cuda")
    matrix = torch.randn(2624, x.shape[1], device="cuda").bfloat16()
    norm = torch.rand(1536, device="cuda") + 0.5
    rows = quantize_rows(x)
    for _ in range(5):
        found_fp8, found, normed = linear_pair(rows, weight, x, matrix, norm, 1e-6)
        assert torch.equal(found_fp8, linear_fp8(rows, weight))
        assert torch.equal(found, linear_bf16(x, matrix))
        assert (normed is None) == (num_tokens > 8)
        if normed is not None:  # a norm's sum has another order in another kernel, which moves few codes
            expected = rms_norm_fp8(found_fp8[:, : len(norm)], norm, 1e-6)
            assert (normed.codes.view(torch.uint8) != expected.codes.view(torch.uint8)).float().mean() <= 1e-3
            assert (normed.exponents != expected.exponents).float().mean() <= 1e-2
    assert not counters(x.device, 64).any()


def test_a_captured_product_follows_its_inputs():
    x, weight = FP8[0][1].make(16, 4, "cuda")
    other = torch.randn_like(x)
    expected = linear_fp8(quantize_rows(other), weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = linear_fp8(quantize_rows(x), weight)
    x.copy_(other)
    graph.replay()
    assert torch.equal(found, expected)
