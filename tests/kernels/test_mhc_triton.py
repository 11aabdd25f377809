"""The Triton mHC kernels against the references, by the interpreter on the CPU."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel

from dsv4_kernels.cases import Shapes
from dsv4_kernels.mhc import reference, triton
from dsv4_kernels.mhc.bench import floor_bytes, flops
from dsv4_kernels.mhc.cases import Case
from dsv4_kernels.norm.reference import rms_norm

BOUND = {
    torch.float32: 1e-6,
    torch.bfloat16: 1e-3,
}  # relative norm; float32 sums decide a bfloat16 rounding now and then
SIZES = [(0, 128), (1, 128), (17, 384), (3, 1100), (65, 128)]  # tokens, hidden; 65 takes the large tiles


def make(num_tokens, hidden, dtype):
    shapes = Shapes(hidden, *(1,) * 9, 4, 1, 1.0, 1.0)
    inputs = Case("random", num_tokens, shapes).make(7, dtype)
    draw = torch.Generator().manual_seed(8)
    return inputs, torch.rand(hidden, generator=draw) + 0.5, torch.randn(num_tokens, hidden, generator=draw).to(dtype)


def assert_close(found, expected, bound):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found.double() - expected.double()).norm() <= bound * expected.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_tokens", "hidden"), SIZES)
def test_boundary_equals_post_pre_and_norm(num_tokens, hidden, dtype):
    inputs, norm, output = make(num_tokens, hidden, dtype)
    _, post, comb = reference.mhc_pre(**inputs)
    found = triton.mhc_boundary(norm=norm, output=output, post=post, comb=comb, **inputs)
    inputs["streams"] = streams = reference.mhc_post(output, inputs["streams"], post, comb)
    merged, new_post, new_comb = reference.mhc_pre(**inputs)
    expected = streams, rms_norm(merged, norm, 1e-6), new_post, new_comb
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, BOUND[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_an_output_the_streams_stay_and_columns_may_be_contiguous(dtype):
    inputs, norm, _ = make(5, 384, dtype)
    merged, post, comb = reference.mhc_pre(**inputs)
    inputs["fn"] = inputs["fn"].t().contiguous().t()
    streams, *found = triton.mhc_boundary(norm=norm, **inputs)
    assert streams is inputs["streams"]
    for one, other in zip(found, (rms_norm(merged, norm, 1e-6), post, comb), strict=True):
        assert_close(one, other, BOUND[dtype])


def test_head_equals_the_collapse_and_norm():
    inputs, norm, _ = make(5, 384, torch.bfloat16)
    head = {key: inputs[key] for key in ("streams", "hc_eps", "norm_eps")}
    head |= {"fn": inputs["fn"][:4], "base": inputs["base"][:4], "scale": inputs["scale"][:1]}
    expected = rms_norm(reference.mhc_head(**head), norm, 1e-6)
    assert_close(triton.mhc_head(norm=norm, **head), expected, BOUND[torch.bfloat16])


def test_head_adds_the_last_output_itself():
    inputs, norm, output = make(5, 384, torch.bfloat16)
    _, post, comb = reference.mhc_pre(**inputs)
    head = {key: inputs[key] for key in ("hc_eps", "norm_eps")} | {"norm": norm}
    head |= {"fn": inputs["fn"][:4], "base": inputs["base"][:4], "scale": inputs["scale"][:1]}
    found = triton.mhc_head(inputs["streams"], **head, output=output, post=post, comb=comb)
    streams = reference.mhc_post(output, inputs["streams"], post, comb)
    assert_close(found, triton.mhc_head(streams, **head), BOUND[torch.bfloat16])


def test_a_token_has_the_same_bits_alone_and_in_a_batch_of_the_same_tiles():
    inputs, norm, _ = make(20, 384, torch.bfloat16)
    together = triton.mhc_boundary(norm=norm, **inputs)
    alone = triton.mhc_boundary(norm=norm, **(inputs | {"streams": inputs["streams"][13:14].contiguous()}))
    assert all(torch.equal(many[13:14], one) for many, one in zip(together, alone, strict=True))


def test_nan_in_one_token_stays_there():
    inputs, norm, _ = make(3, 128, torch.bfloat16)
    inputs["streams"][1, 2, 5] = torch.nan
    _, x, post, comb = triton.mhc_boundary(norm=norm, **inputs)
    for values in (x, post, comb):
        assert values[1].isnan().any()
        assert values[[0, 2]].isfinite().all()


def test_other_numbers_of_streams_are_refused():
    inputs, norm, _ = make(2, 128, torch.float32)
    inputs["streams"] = inputs["streams"][:, :3].contiguous()
    with pytest.raises(ValueError, match=r"\[2, 3, 128\]; the Triton kernels take contiguous \[T, 4, D\]"):
        triton.mhc_boundary(norm=norm, **inputs)


def test_the_floor_of_a_pro_decode_step():
    assert floor_bytes(1, 7168) == 143_360 + 2_752_512  # the mix matrix is 95 % of it
    assert flops(1, 7168) == 232 * 7168
