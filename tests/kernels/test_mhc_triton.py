"""The Triton mHC kernels against the references, by the interpreter on the CPU."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel

from dsv4_kernels.arrival import counters
from dsv4_kernels.cases import Shapes
from dsv4_kernels.gemm.fp8 import Fp8Rows
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.mhc import reference, triton
from dsv4_kernels.mhc.bench import floor_bytes, flops
from dsv4_kernels.mhc.cases import Case
from dsv4_kernels.norm.reference import rms_norm

BOUND = {
    torch.float32: 1e-6,
    torch.bfloat16: 1e-3,
}  # relative norm; float32 sums decide a bfloat16 rounding now and then
SIZES = [(0, 128), (1, 128), (2, 1152), (17, 384), (4, 384), (5, 1152), (65, 128)]  # tokens, hidden; all three tiles


def make(num_tokens, hidden, dtype, num_parts=None):
    shapes = Shapes(hidden, *(1,) * 9, 4, 1, 1.0, 1.0)
    inputs = Case("random", num_tokens, shapes).make(7, dtype)
    draw = torch.Generator().manual_seed(8)
    size = (num_tokens, hidden) if num_parts is None else (num_tokens, num_parts, hidden)
    return inputs, torch.rand(hidden, generator=draw) + 0.5, torch.randn(size, generator=draw).to(dtype)


def assert_close(found, expected, bound):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found.double() - expected.double()).norm() <= bound * expected.double().norm()


def assert_same_bits(found, expected):
    """Of two results of `mhc_boundary`."""
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Fp8Rows):
            assert torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
            assert torch.equal(one.exponents, other.exponents)
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("num_parts", [None, 1, 7])
@pytest.mark.parametrize(("num_tokens", "hidden"), [(5, 1152), (18, 128)])
def test_many_tokens_get_the_same_in_another_way(num_tokens, hidden, num_parts, monkeypatch):
    inputs, norm, output = make(num_tokens, hidden, torch.bfloat16, num_parts)
    _, post, comb = reference.mhc_pre(**inputs)
    given = {} if num_parts is None else {"output": output, "post": post, "comb": comb}
    few = triton.mhc_boundary(norm=norm, **given, **inputs)
    monkeypatch.setattr(triton, "MANY", 1)
    many = triton.mhc_boundary(norm=norm, **given, **inputs)
    assert torch.equal(few[0], many[0])
    assert_close(many[1], few[1], BOUND[torch.bfloat16])
    assert_same_bits([many[2]], [quantize_rows(many[1])])
    for one, other in zip(many[3:], few[3:], strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_tokens", "hidden"), SIZES)
def test_boundary_equals_post_pre_and_norm_and_quantises_x(num_tokens, hidden, dtype):
    inputs, norm, output = make(num_tokens, hidden, dtype)
    _, post, comb = reference.mhc_pre(**inputs)
    streams, x, x_fp8, *found = triton.mhc_boundary(norm=norm, output=output, post=post, comb=comb, **inputs)
    inputs["streams"] = reference.mhc_post(output, inputs["streams"], post, comb)
    merged, new_post, new_comb = reference.mhc_pre(**inputs)
    expected = inputs["streams"], rms_norm(merged, norm, 1e-6), new_post, new_comb
    for one, other in zip((streams, x, *found), expected, strict=True):
        assert_close(one, other, BOUND[dtype])
    assert_same_bits([x_fp8], [quantize_rows(x)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_an_output_the_streams_stay_and_columns_may_be_contiguous(dtype):
    inputs, norm, _ = make(5, 384, dtype)
    merged, post, comb = reference.mhc_pre(**inputs)
    inputs["fn"] = inputs["fn"].t().contiguous().t()
    streams, x, _, *found = triton.mhc_boundary(norm=norm, **inputs)
    assert streams is inputs["streams"]
    for one, other in zip((x, *found), (rms_norm(merged, norm, 1e-6), post, comb), strict=True):
        assert_close(one, other, BOUND[dtype])


@pytest.mark.parametrize("num_parts", [1, 3, 7])
@pytest.mark.parametrize("num_tokens", [1, 5, 66])
def test_parts_of_an_output_are_added_in_order_and_rounded_once(num_parts, num_tokens):
    inputs, norm, output = make(num_tokens, 256, torch.bfloat16, num_parts)
    output[0, 0] *= 1e3  # so that another order, or a rounding in between, would show
    _, post, comb = reference.mhc_pre(**inputs)
    total = torch.zeros(num_tokens, 256)
    for part in output.unbind(1):
        total += part.float()
    arguments = {"norm": norm, "post": post, "comb": comb} | inputs
    found = triton.mhc_boundary(output=output, **arguments)
    assert_same_bits(found, triton.mhc_boundary(output=total.bfloat16(), **arguments))


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_head_equals_the_collapse_and_norm(num_tokens):
    inputs, norm, _ = make(num_tokens, 1100, torch.bfloat16)
    head = {key: inputs[key] for key in ("streams", "hc_eps", "norm_eps")}
    head |= {"fn": inputs["fn"][:4], "base": inputs["base"][:4], "scale": inputs["scale"][:1]}
    expected = rms_norm(reference.mhc_head(**head), norm, 1e-6)
    streams, found = triton.mhc_head(norm=norm, **head)
    assert streams is inputs["streams"]
    assert_close(found, expected, BOUND[torch.bfloat16])


@pytest.mark.parametrize("num_tokens", [1, 5, 66, 300])
def test_head_adds_the_last_output_itself(num_tokens):
    inputs, norm, output = make(num_tokens, 384, torch.bfloat16)
    _, post, comb = reference.mhc_pre(**inputs)
    head = {key: inputs[key] for key in ("hc_eps", "norm_eps")} | {"norm": norm}
    head |= {"fn": inputs["fn"][:4], "base": inputs["base"][:4], "scale": inputs["scale"][:1]}
    new_streams, found = triton.mhc_head(inputs["streams"], **head, output=output, post=post, comb=comb)
    streams = reference.mhc_post(output, inputs["streams"], post, comb)
    assert_close(new_streams, streams, BOUND[torch.bfloat16])
    assert_close(found, triton.mhc_head(streams, **head)[1], BOUND[torch.bfloat16])


@pytest.mark.parametrize("tiles", [triton.Tiles(1, 64), triton.Tiles(16, 128), triton.Tiles(64, 32)], ids=str)
def test_with_fixed_tiles_a_token_has_the_same_bits_alone_and_in_any_batch(tiles):
    inputs, norm, output = make(20, 384, torch.bfloat16, 3)
    _, post, comb = reference.mhc_pre(**inputs)
    rows = {"output": output, "post": post, "comb": comb, "streams": inputs.pop("streams")}
    together = triton.mhc_boundary(norm=norm, tiles=tiles, **inputs, **rows)
    rows = {key: value[13:14].contiguous() for key, value in rows.items()}
    alone = triton.mhc_boundary(norm=norm, tiles=tiles, **inputs, **rows)
    assert_same_bits([Fp8Rows(value.codes[13:14], value.exponents[13:14]) if isinstance(value, Fp8Rows)
                      else value[13:14] for value in together], alone)  # fmt: skip


def test_the_last_program_leaves_its_counter_at_zero():
    inputs, norm, _ = make(2, 384, torch.bfloat16)
    first, again = (triton.mhc_boundary(norm=norm, **inputs) for _ in range(2))
    assert not counters(norm.device, 2).any()
    assert_same_bits(first, again)


def test_slices_are_as_small_as_one_program_for_each_multiprocessor_allows():
    few = {1: (1, 64), 2: (1, 128), 3: (1, 128), 4: (1, 128)}  # two programs of three and four tokens
    some = {5: (16, 64), 16: (16, 64), 17: (16, 128), 64: (16, 256), 65: (64, 128), 256: (64, 256), 512: (64, 512)}
    expected = few | some | {8192: (64, 512)}
    assert {num_tokens: triton.tiles_for(num_tokens, 7168) for num_tokens in expected} == expected


@pytest.mark.parametrize("num_tokens", [2, 3])
def test_nan_in_one_token_stays_there(num_tokens):
    inputs, norm, _ = make(num_tokens, 128, torch.bfloat16)
    inputs["streams"][1, 2, 5] = torch.nan
    _, x, x_fp8, post, comb = triton.mhc_boundary(norm=norm, **inputs)
    for values in (x, post, comb):
        assert values[1].isnan().any()
        assert values[::2].isfinite().all()
    assert x_fp8.exponents.flatten().eq(255).tolist() == [False, True, False][:num_tokens]


def test_other_numbers_of_streams_are_refused():
    inputs, norm, _ = make(2, 128, torch.float32)
    inputs["streams"] = inputs["streams"][:, :3].contiguous()
    with pytest.raises(ValueError, match=r"\[2, 3, 128\]; the Triton kernels take contiguous \[T, 4, D\]"):
        triton.mhc_boundary(norm=norm, **inputs)


def test_a_hidden_size_that_has_no_whole_groups_is_refused():
    inputs, norm, _ = make(2, 200, torch.float32)
    with pytest.raises(ValueError, match=r"\[2, 4, 200\]; expected D a multiple of 128"):
        triton.mhc_boundary(norm=norm, **inputs)


def test_the_floor_of_a_pro_decode_step():
    assert floor_bytes(1, 7168, 1) == 143_360 + 7_224 + 2_752_512  # the mix matrix is 95 % of it
    assert floor_bytes(1, 7168, 7) - floor_bytes(1, 7168, 1) == 6 * 14_336
    assert flops(1, 7168, 1) == 233 * 7168
