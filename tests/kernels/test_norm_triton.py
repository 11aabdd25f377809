"""The Triton norm against the reference, by the interpreter on the CPU."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel

from dsv4_kernels.benching import relative_error
from dsv4_kernels.cases import SMALL
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.norm import reference, triton
from dsv4_kernels.norm.bench import floor_bytes
from dsv4_kernels.norm.cases import CASES
from dsv4_kernels.norm.embed import embed_and_norm_fp8

BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-3}  # relative norm
RUNS = [case for case in CASES if case.name in SMALL]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", RUNS, ids=lambda case: case.name)
def test_equals_the_reference(case, dtype, weighted):
    inputs = case.make(1, dtype) | ({} if weighted else {"weight": None})
    found, expected = triton.rms_norm(**inputs), reference.rms_norm(**inputs)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    assert case.num_tokens == 0 or relative_error(found, expected) <= BOUND[dtype]


@pytest.mark.parametrize("case", RUNS, ids=lambda case: case.name)
def test_quantised_result_has_the_bits_of_norm_then_quantise(case):
    inputs = case.make(2, torch.bfloat16)
    found, expected = triton.rms_norm_fp8(**inputs), quantize_rows(triton.rms_norm(**inputs))
    assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(found.exponents, expected.exponents)


def test_rows_of_a_table_and_others_have_the_bits_of_two_norms():
    random = torch.Generator().manual_seed(5)
    table, x = (torch.randn(num, 384, generator=random).bfloat16() for num in (7, 12))
    weight, other = (torch.rand(384, generator=random) + 0.5 for _ in range(2))
    ids = torch.tensor([6, 0, 6])
    expected = triton.rms_norm_fp8(table[ids], weight, 1e-6), triton.rms_norm_fp8(x, other, 1e-6)
    for found, rows in zip(embed_and_norm_fp8(table, ids, weight, x, other, 1e-6), expected, strict=True):
        assert torch.equal(found.codes.view(torch.uint8), rows.codes.view(torch.uint8))
        assert torch.equal(found.exponents, rows.exponents)
    with pytest.raises(ValueError, match="one width"):
        embed_and_norm_fp8(table.float(), ids, weight, x, other, 1e-6)


def test_columns_of_a_larger_matrix_and_any_width():
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(3))
    part, weight = x[:, 20:120], torch.rand(100) + 0.5
    assert relative_error(triton.rms_norm(part, weight, 1e-2), reference.rms_norm(part, weight, 1e-2)) <= 1e-6
    with pytest.raises(ValueError, match=r"x is \[300, 3\] with strides \(1, 300\)"):
        triton.rms_norm(x.t(), None, 1e-6)


def test_the_floor_of_one_row():
    assert floor_bytes(1, 7168, fp8=False) == 2 * 7168 * 2 + 4 * 7168
    assert floor_bytes(2, 1536, fp8=True) == 2 * (3 * 1536 + 12) + 4 * 1536
