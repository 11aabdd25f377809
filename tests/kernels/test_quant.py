"""Quantisation against the golden byte vectors, and the properties that they cannot show."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsv4_kernels.quant import (
    dequantize_fp4,
    dequantize_fp4_weight,
    dequantize_fp8,
    dequantize_fp8_blocks,
    fake_quantize_fp4,
    fake_quantize_fp8,
    hadamard,
    quantize_fp4,
    quantize_fp4_weight,
    quantize_fp8,
    quantize_fp8_blocks,
)
from dsv4_kernels.quant import reference as quant

VECTORS = Path(__file__).parents[1] / "golden" / "tiny-random" / "quant_vectors.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(VECTORS)


def test_fp8_activations_equal_the_golden_bytes(golden):
    codes, scale = quantize_fp8(golden["fp8.x"], 128)
    assert torch.equal(codes.view(torch.uint8), golden["fp8.q_bytes"])
    assert torch.equal(scale, golden["fp8.scale_e8m0"])
    assert torch.equal(dequantize_fp8(codes, scale, 128), golden["fp8.dequant"])
    assert torch.equal(fake_quantize_fp8(golden["fp8.x"], 128).float(), golden["fp8.dequant"])


def test_kv_rows_equal_the_golden_bytes(golden):
    nope = golden["kv.x"][:, :448]
    codes, scale = quantize_fp8(nope, 64)
    assert torch.equal(codes.view(torch.uint8), golden["kv.q_bytes"])
    assert torch.equal(scale, golden["kv.scale_e8m0"])
    assert torch.equal(fake_quantize_fp8(nope, 64), golden["kv.out"][:, :448])
    assert torch.equal(golden["kv.x"][:, 448:], golden["kv.out"][:, 448:])  # rope dims stay


def test_indexer_rows_equal_the_golden_bytes(golden):
    assert torch.equal(hadamard(golden["idx.x"]).bfloat16(), golden["idx.hadamard"])
    packed, scale = quantize_fp4(golden["idx.fp4_in"])
    assert torch.equal(packed, golden["idx.fp4_packed"])
    assert torch.equal(scale, golden["idx.scale_e8m0"])
    assert torch.equal(dequantize_fp4(packed, scale).bfloat16(), golden["idx.out"])
    assert torch.equal(fake_quantize_fp4(golden["idx.fp4_in"]), golden["idx.out"])


def test_weights_decode_to_the_golden_values(golden):
    assert torch.equal(dequantize_fp4_weight(golden["w4.packed"], golden["w4.scale_e8m0"]), golden["w4.dequant"])
    weight = golden["w8.bytes"].view(torch.float8_e4m3fn)
    for scale in (golden["w8.scale_e8m0"], golden["w8.scale_e8m0"].view(torch.float8_e8m0fnu)):
        assert torch.equal(dequantize_fp8_blocks(weight, scale), golden["w8.dequant_bf16"].float())


def test_all_scale_bytes_are_decoded():
    scale = torch.arange(255, dtype=torch.uint8)
    ones = torch.ones(255, 32).to(torch.float8_e4m3fn)
    expected = torch.tensor([2.0 ** (byte - 127) for byte in range(255)], dtype=torch.float64)
    assert torch.equal(dequantize_fp8(ones, scale.unsqueeze(1), 32)[:, 0].double(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fake_quantisation_equals_the_pair(dtype):
    x = torch.randn(7, 3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    x *= torch.logspace(-6, 6, 7).view(7, 1, 1).to(dtype)
    assert torch.equal(fake_quantize_fp8(x, 64), dequantize_fp8(*quantize_fp8(x, 64), 64).to(dtype))
    assert torch.equal(fake_quantize_fp4(x), dequantize_fp4(*quantize_fp4(x)).to(dtype))


@pytest.mark.parametrize(("values", "ties"), [(torch.float8_e4m3fn, 2.0**-4), ("fp4", 0.25)])
def test_rounding_is_to_nearest(values, ties):
    """The error is at most half the spacing of the format, relative to the group's largest value."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)).double()
    rounded = fake_quantize_fp4(x.float()) if values == "fp4" else fake_quantize_fp8(x.float(), 128)
    largest = x.abs().unflatten(1, (-1, 32 if values == "fp4" else 128)).amax(-1, keepdim=True)
    error = (rounded.double() - x).abs().unflatten(1, (-1, 32 if values == "fp4" else 128))
    assert (error <= largest * ties).all()
    assert (error > largest * ties / 4).any()


def test_weights_that_a_format_holds_survive_conversion():
    random = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (4, 24, 64), generator=random)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    weight = table[codes]
    weight[..., ::32] = 6.0
    weight *= 2.0 ** torch.randint(-9, 3, (4, 24, 1), generator=random)
    packed, scale = quantize_fp4_weight(weight)
    assert packed.dtype == torch.int8
    assert torch.equal(dequantize_fp4_weight(packed, scale), weight)
    assert torch.equal(dequantize_fp4_weight(packed.view(torch.uint8), scale.view(torch.float8_e8m0fnu)), weight)

    blocks = torch.randn(160, 256, generator=random).to(torch.float8_e4m3fn).float()
    blocks[::128, ::128] = 448.0
    blocks *= 2.0**-20  # below the floor of activations: weights must not flush to zero
    weight8, scale8 = quantize_fp8_blocks(blocks)
    assert scale8.shape == (2, 2)
    assert torch.equal(dequantize_fp8_blocks(weight8, scale8), blocks)


def test_all_zero_groups_stay_zero():
    zero = torch.zeros(2, 128)
    assert not fake_quantize_fp8(zero, 128).any()
    assert not fake_quantize_fp4(zero).any()
    assert not dequantize_fp8_blocks(*quantize_fp8_blocks(torch.zeros(130, 5))).any()


def test_hadamard_is_an_orthogonal_sylvester_matrix():
    matrix = hadamard(torch.eye(8, dtype=torch.float32)) * 8**0.5
    expected = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(8)] for i in range(8)])
    assert torch.allclose(matrix, expected)


def test_gradient_passes_through_rounding():
    for rounding in (lambda x: fake_quantize_fp8(x, 64), fake_quantize_fp4):
        x = torch.randn(3, 128, requires_grad=True)
        gradient = torch.randn(3, 128)
        rounding(x).backward(gradient)
        assert torch.equal(x.grad, gradient)


def test_hadamard_trains_after_inference():
    with torch.inference_mode():
        hadamard(torch.ones(1, 16))
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    hadamard(x).square().sum().backward()
    assert (x.grad - 2 * x).norm() < 1e-6 * x.norm()  # orthogonal


def test_zero_rows_and_wrong_groups():
    assert fake_quantize_fp8(torch.empty(0, 128), 128).shape == (0, 128)
    assert quantize_fp4(torch.empty(0, 128))[0].shape == (0, 64)
    assert hadamard(torch.empty(0, 32)).shape == (0, 32)
    with pytest.raises(ValueError, match="multiple of the group, 128"):
        fake_quantize_fp8(torch.ones(2, 100), 128)
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.ones(2, 48))


def test_constants_follow_the_device_of_their_input():
    """Training on a GPU left its tables there, and the export on the CPU failed."""
    x = torch.linspace(-7, 7, 128)
    expected = fake_quantize_fp4(x), hadamard(x), dequantize_fp4(*quantize_fp4(x))
    quant._fp4_thresholds.cache_clear()
    quant._fp4_table.cache_clear()
    quant._hadamard_matrix.cache_clear()
    other = torch.empty(128, device="meta")
    assert fake_quantize_fp4(other).is_meta
    assert hadamard(other).is_meta
    found = fake_quantize_fp4(x), hadamard(x), dequantize_fp4(*quantize_fp4(x))
    assert all(map(torch.equal, found, expected))
