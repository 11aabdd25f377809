"""The shared expert in Triton against the reference, by the interpreter on the CPU."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.poison import poisoned  # noqa: F401

from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.gemm.triton import Tiles
from dsv4_kernels.mega_moe import reference
from dsv4_kernels.mega_moe.shared import shared_expert, swiglu_fp8
from dsv4_kernels.quant import dequantize_fp8, dequantize_fp8_blocks, quantize_fp8, quantize_fp8_blocks

BOUND = 1e-3  # relative norm: a float32 sum in another order decides a bfloat16 or FP8 rounding now and then
LIMIT = 2.0
pytestmark = pytest.mark.usefixtures("poisoned")


def make(num_tokens, hidden, width):
    """x, and each weight as the kernel and as the reference take it; a fourth of the products passes the clamp."""
    draw = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden, generator=draw).bfloat16()
    weights, values = [], []
    for rows, columns in ((2 * width, hidden), (hidden, width)):
        codes, scale = quantize_fp8_blocks(torch.randn(rows, columns, generator=draw) * 2 / columns**0.5)
        weights.append(Fp8Weight.from_checkpoint(codes, scale))
        values.append(dequantize_fp8_blocks(codes, scale))
    return x, weights, values


@pytest.mark.parametrize(("num_tokens", "hidden", "width"), [(0, 128, 128), (1, 256, 128), (20, 128, 640)])
def test_equals_the_reference(num_tokens, hidden, width):
    x, weights, values = make(num_tokens, hidden, width)
    found = shared_expert(quantize_rows(x), *weights, limit=LIMIT)
    expected = reference.shared_expert(x, *values, limit=LIMIT, quantize=True)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= BOUND * expected.double().norm()


def test_the_middle_has_the_bits_of_the_reference_but_for_the_exponential():
    """One unit of E4M3 in a thousand values: torch and NumPy round exp differently."""
    gate_up = (3 * torch.randn(7, 2 * 640, generator=torch.Generator().manual_seed(1))).bfloat16()
    rows = swiglu_fp8(gate_up, LIMIT)
    codes, scale = quantize_fp8(reference._activate(gate_up, LIMIT).bfloat16(), 128)
    assert torch.equal(rows.exponents, scale)
    found, expected = dequantize_fp8(rows.codes, scale, 128), dequantize_fp8(codes, scale, 128)
    assert (found != expected).float().mean() < 1e-3


def test_nan_in_one_token_stays_there():
    x, weights, _ = make(5, 128, 128)
    tiles = Tiles(16, 1, 4, 3)
    clean = shared_expert(quantize_rows(x), *weights, limit=LIMIT, tiles=tiles)
    x[2, 7] = torch.nan
    found = shared_expert(quantize_rows(x), *weights, limit=LIMIT, tiles=tiles)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 192\] .*; expected contiguous \[T, 2I\], I a multiple of 128"):
        swiglu_fp8(torch.zeros(2, 192, dtype=torch.bfloat16), LIMIT)
