"""The mHC kernels on a GPU against the references, at the shapes of the released models."""

import pytest
import torch

from dsv4_kernels.benching import relative_error
from dsv4_kernels.cases import DEMO, FLASH, PRO
from dsv4_kernels.mhc import reference, triton
from dsv4_kernels.mhc.bench import boundary_reference, make
from dsv4_kernels.norm.reference import rms_norm

BOUND = 1e-3  # relative norm, bfloat16


@pytest.mark.parametrize("num_tokens", [0, 1, 17, 64, 65, 300])
@pytest.mark.parametrize(("name", "shapes"), [("pro", PRO), ("flash", FLASH), ("demo", DEMO)])
def test_boundary_equals_post_pre_and_norm(name, shapes, num_tokens):
    inputs = make(name, shapes, num_tokens, seed=1)
    for found, expected in zip(triton.mhc_boundary(**inputs), boundary_reference(**inputs), strict=True):
        assert found.dtype == expected.dtype
        assert num_tokens == 0 or relative_error(found, expected) <= BOUND


@pytest.mark.parametrize(("name", "shapes"), [("pro", PRO), ("flash", FLASH)])
def test_head_equals_the_collapse_and_norm(name, shapes):
    inputs = make(name, shapes, 33, seed=2)
    head = {key: inputs[key] for key in ("streams", "hc_eps", "norm_eps")}
    head |= {"fn": inputs["fn"][:4], "base": inputs["base"][:4], "scale": inputs["scale"][:1]}
    expected = rms_norm(reference.mhc_head(**head), inputs["norm"], 1e-6)
    assert relative_error(triton.mhc_head(norm=inputs["norm"], **head), expected) <= BOUND


def test_a_token_has_the_same_bits_alone_and_in_a_batch_of_the_same_tiles():
    inputs = make("flash", FLASH, 20, seed=3)
    rows = {key: inputs[key][13:14].contiguous() for key in ("output", "post", "comb", "streams")}
    together, alone = triton.mhc_boundary(**inputs), triton.mhc_boundary(**(inputs | rows))
    assert all(torch.equal(many[13:14], one) for many, one in zip(together, alone, strict=True))
