"""The mHC kernels on a GPU against the references, at the shapes of the released models."""

import pytest
import torch

from dsv4_kernels.arrival import counters
from dsv4_kernels.benching import relative_error
from dsv4_kernels.cases import DEMO, FLASH, PRO
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.mhc import reference, triton
from dsv4_kernels.mhc.bench import boundary, boundary_reference, make
from dsv4_kernels.norm.reference import rms_norm

BOUND = 1e-3  # relative norm, bfloat16


@pytest.mark.parametrize("num_parts", [1, 7])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17, 64, 65, 300])
@pytest.mark.parametrize(("name", "shapes"), [("pro", PRO), ("flash", FLASH), ("demo", DEMO)])
def test_boundary_equals_post_pre_and_norm(name, shapes, num_tokens, num_parts):
    inputs = make(name, shapes, num_tokens, num_parts, seed=1)
    for found, expected in zip(boundary(**inputs), boundary_reference(**inputs), strict=True):
        assert found.dtype == expected.dtype
        assert num_tokens == 0 or relative_error(found, expected) <= BOUND


@pytest.mark.parametrize("num_tokens", [1, 33, 200])
def test_x_is_quantised_as_quantize_rows_does(num_tokens):
    _, x, found, *_ = triton.mhc_boundary(**make("pro", PRO, num_tokens, 1, seed=4))
    expected = quantize_rows(x)
    assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(found.exponents, expected.exponents)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_the_last_program_sees_the_streams_of_all_in_every_one_of_many_launches(num_tokens):
    inputs = make("pro", PRO, num_tokens, 7, seed=5)
    first = boundary(**inputs)
    for _ in range(200):
        assert all(torch.equal(one, other) for one, other in zip(boundary(**inputs), first, strict=True))
    assert not counters(inputs["norm"].device, num_tokens).any()


@pytest.mark.parametrize(("name", "shapes"), [("pro", PRO), ("flash", FLASH)])
def test_head_equals_the_collapse_and_norm(name, shapes):
    inputs = make(name, shapes, 33, 1, seed=2)
    head = {key: inputs[key] for key in ("streams", "hc_eps", "norm_eps")}
    head |= {"fn": inputs["fn"][:4], "base": inputs["base"][:4], "scale": inputs["scale"][:1]}
    expected = rms_norm(reference.mhc_head(**head), inputs["norm"], 1e-6)
    assert relative_error(triton.mhc_head(norm=inputs["norm"], **head)[1], expected) <= BOUND


@pytest.mark.parametrize("tiles", [triton.Tiles(1, 64), triton.Tiles(16, 128), triton.Tiles(64, 256)], ids=str)
def test_with_fixed_tiles_a_token_has_the_same_bits_alone_and_in_any_batch(tiles):
    inputs = make("flash", FLASH, 20, 7, seed=3) | {"tiles": tiles}
    rows = {key: inputs[key][13:14].contiguous() for key in ("output", "post", "comb", "streams")}
    together, alone = boundary(**inputs), boundary(**(inputs | rows))
    assert all(torch.equal(many[13:14], one) for many, one in zip(together, alone, strict=True))
