"""The norms on a GPU against the reference, at the widths of the released models."""

import pytest
import torch

from dsv4_kernels.benching import relative_error
from dsv4_kernels.norm import reference, triton
from dsv4_kernels.quant import dequantize_fp8, fake_quantize_fp8

BOUND = 1e-3  # relative norm, bfloat16
BOUND_FP8 = 3e-3  # another order of sums may round a value to the next code


@pytest.mark.parametrize("num_tokens", [0, 1, 17, 300])
@pytest.mark.parametrize("dim", [128, 512, 1024, 1536, 4096, 7168])
def test_equals_the_reference(dim, num_tokens):
    x = torch.randn(num_tokens, dim + 512, device="cuda").bfloat16()[:, :dim]
    weight = torch.randn(dim, device="cuda")
    found = triton.rms_norm(x, weight, 1e-6)
    assert num_tokens == 0 or relative_error(found, reference.rms_norm(x, weight, 1e-6)) <= BOUND
    rows, quantised = triton.rms_norm_fp8(x, weight, 1e-6), fake_quantize_fp8(found, 128)
    assert num_tokens == 0 or relative_error(dequantize_fp8(rows.codes, rows.exponents, 128), quantised) <= BOUND_FP8
