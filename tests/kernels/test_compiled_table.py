"""benchmarks/compiled_kernels.py: rows of the table from answers of the compile gate."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/compiled_kernels.py"
KERNEL = {
    "kernel": "_product", "run": "pro", "warps": 4, "stages": 3, "registers": 80, "shared_bytes": 2048,
    "tensor_memory_columns": 0, "matrix_instructions": {"HGMMA": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compiled_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_runs_with_equal_numbers_share_a_row_and_the_demo_has_none(script):
    hopper = [
        KERNEL,
        KERNEL | {"run": "flash"},
        KERNEL | {"run": "pro, split", "registers": 81},
        KERNEL | {"run": "demo"},
    ]
    more = {"tensor_memory_columns": 64, "matrix_instructions": {}}
    assert list(script.rows("gemm", hopper, [kernel | more for kernel in hopper])) == [
        "| gemm | `_product` | pro (+1) | 4 | 3 | 80 | 2.0 | 4 HGMMA | 4 | 3 | 80 | 2.0 + 64 | - |",
        "| gemm | `_product` | pro, split | 4 | 3 | 81 | 2.0 | 4 HGMMA | 4 | 3 | 81 | 2.0 + 64 | - |",
    ]


def test_a_kernel_that_one_target_does_without_has_dashes_there(script):
    others = [KERNEL | {"kernel": "widen"}, KERNEL]
    assert list(script.rows("gemm", others, [KERNEL])) == [
        "| gemm | `widen` | pro | 4 | 3 | 80 | 2.0 | 4 HGMMA | - | - | - | - | - |",
        "| gemm | `_product` | pro | 4 | 3 | 80 | 2.0 | 4 HGMMA | 4 | 3 | 80 | 2.0 | 4 HGMMA |",
    ]
