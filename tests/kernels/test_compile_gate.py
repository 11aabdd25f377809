"""Every Triton kernel compiles for Hopper and for GB300 at true shapes, with everything in registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GATE = Path(__file__).parents[1] / "support/compile_gate.py"
MAX_SHARED_BYTES = 227 << 10


@pytest.mark.parametrize(("capability", "target", "large"), [(90, "sm_90a", "HGMMA"), (103, "sm_103a", "UTCHMMA")])
def test_kernels_compile_without_stack_and_on_the_tensor_cores(capability, target, large):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    run = subprocess.run([sys.executable, GATE, str(capability)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {"_mix", "_finish"}
    for kernel in kernels:
        assert kernel["target"] == target
        assert kernel["stack_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= MAX_SHARED_BYTES, kernel
        if kernel["kernel"] == "_mix":  # few tokens fill no warpgroup tile
            assert set(kernel["matrix_instructions"]) == {large if "128 tokens" in kernel["run"] else "HMMA"}, kernel
