"""The Triton quantisation kernels against the references, bit by bit, by the interpreter on the CPU."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel

from dsv4_kernels.quant import reference, triton
from dsv4_kernels.quant.cases import CASES, adversarial, all_bfloat16

FORMATS = [("fp8", 128), ("fp8", 64), ("fp4", 32), ("fp4", 128)]


def assert_equal_bits(x, name, group):
    """Codes, scales and rounded values."""
    found = getattr(triton, f"quantize_{name}")(x, group)
    expected = getattr(reference, f"quantize_{name}")(x, group)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    rounded = getattr(triton, f"fake_quantize_{name}")(x, group)
    same = getattr(reference, f"fake_quantize_{name}")(x, group)
    integer = torch.int16 if x.dtype is torch.bfloat16 else torch.int32
    assert torch.equal(rounded.view(integer), same.view(integer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "group"), FORMATS)
@pytest.mark.parametrize("case", [case for case in CASES if case.num_tokens < 64], ids=lambda case: case.name)
def test_random_groups_of_any_size(case, name, group, dtype):
    assert_equal_bits(case.make(5, dtype)["x"], name, group)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "group"), FORMATS)
def test_adversarial_groups(name, group, dtype):
    assert_equal_bits(adversarial(group).to(dtype), name, group)


@pytest.mark.parametrize(("name", "largest", "group"), [("fp4", 6.0, 32), ("fp8", 448.0, 64)])
def test_every_bfloat16_magnitude_rounds_as_it_stands(name, largest, group):
    x = all_bfloat16(largest, group)
    assert getattr(triton, f"quantize_{name}")(x, group)[1].unique().tolist() == [127]  # the scale is 1
    assert_equal_bits(x, name, group)


@pytest.mark.parametrize(("name", "group"), FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_group_and_shows(name, group, bad):
    x = torch.randn(3, 4 * group, generator=torch.Generator().manual_seed(6))
    expected = getattr(reference, f"fake_quantize_{name}")(x, group)
    x[1, group + 5] = bad
    codes, scales = getattr(triton, f"quantize_{name}")(x, group)
    values = getattr(reference, f"dequantize_{name}")(codes, scales, group)
    rounded = getattr(triton, f"fake_quantize_{name}")(x, group)
    hit = torch.zeros_like(x, dtype=torch.bool)
    hit[1, group : 2 * group] = True
    for result in (values, rounded):
        assert torch.equal(result[~hit], expected[~hit])
        assert not result[1, group + 5].isfinite()
    assert scales[1, 1] == 255


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="the last dim is 100; expected a multiple of the group, 32"):
        triton.quantize_fp4(torch.zeros(2, 100))
    with pytest.raises(ValueError, match="the group is 16; the Triton kernels take 32, 64 or 128"):
        triton.quantize_fp8(torch.zeros(2, 128), 16)
    with pytest.raises(ValueError, match="expected a contiguous tensor"):
        triton.fake_quantize_fp8(torch.zeros(128, 128).t(), 128)
