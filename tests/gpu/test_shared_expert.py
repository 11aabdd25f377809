"""The shared expert on a GPU against the reference, at the shapes of the released models."""

import pytest
import torch

from dsv4_kernels.benching import relative_error
from dsv4_kernels.cases import DEMO, FLASH, PRO
from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.mega_moe import reference
from dsv4_kernels.mega_moe.shared import shared_expert
from dsv4_kernels.quant import dequantize_fp8_blocks, quantize_fp8_blocks

BOUND = 5e-3  # relative norm: sums in another order move a rounding, and that an FP8 rounding of a hidden value


@pytest.mark.parametrize("num_tokens", [0, 1, 17, 300])
@pytest.mark.parametrize("shapes", [PRO, FLASH, DEMO], ids=["pro", "flash", "demo"])
def test_equals_the_reference(shapes, num_tokens):
    hidden, width, limit = shapes.hidden_size, shapes.moe_intermediate_size, shapes.swiglu_limit
    weights, values = [], []
    for rows, columns in ((2 * width, hidden), (hidden, width)):
        codes, scale = quantize_fp8_blocks(torch.randn(rows, columns, device="cuda") * 8 / columns**0.5)
        weights.append(Fp8Weight.from_checkpoint(codes, scale))
        values.append(dequantize_fp8_blocks(codes, scale))
    x = torch.randn(num_tokens, hidden, device="cuda").bfloat16()
    found = shared_expert(quantize_rows(x), *weights, limit=limit)
    expected = reference.shared_expert(x, *values, limit=limit, quantize=True)
    assert found.shape == expected.shape
    assert num_tokens == 0 or relative_error(found, expected) <= BOUND
