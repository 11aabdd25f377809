"""Compiles the Triton kernels for a GPU that is not here; prints what the compiler made of them, one JSON line each.

    python tests/support/compile_gate.py 103     (90 = Hopper, 103 = GB300)

A process of its own: TRITON_INTERPRET must not be set, and the stub driver stays. The public functions of the kernels
run on CPU tensors of true shapes; each launch compiles instead of launching.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class StubDriver(DriverBase):
    """Says what GPU there would be."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    def get_benchmarker(self):
        return None

    def get_empty_cache_for_benchmark(self):
        return None


def record_launches(capability: int) -> list:
    """From now on a launch compiles; the compiled kernels are appended to the list."""
    triton.runtime.driver.set_active(StubDriver(capability))
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    return compiled


def describe(kernel, run: str) -> dict:
    """Resources and matrix instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, _, local = map(int, RESOURCES.search(usage).groups())
    matrix = {name: len(re.findall(rf"\b{name}\b", sass)) for name in MATRIX}
    return {
        "kernel": kernel.name,
        "run": run,
        "target": re.search(r"\.target (\S+)", kernel.asm["ptx"])[1].rstrip(","),
        "registers": registers,
        "stack_bytes": stack + local,
        "shared_bytes": kernel.metadata.shared,
        "matrix_instructions": {name: count for name, count in matrix.items() if count},
    }


def launch_mhc(name: str, shapes, num_tokens: int) -> None:
    """The mHC kernels: boundary with and without a finished sublayer, and the final collapse."""
    from dsv4_kernels.mhc import triton as mhc
    from dsv4_kernels.mhc.cases import Case

    inputs = Case(name, num_tokens, shapes).make(0, torch.bfloat16)
    streams, norm = inputs["streams"], torch.ones(shapes.hidden_size)
    post, comb = torch.ones(num_tokens, 4), torch.ones(num_tokens, 4, 4)
    mhc.mhc_boundary(norm=norm, output=streams[:, 0].contiguous(), post=post, comb=comb, **inputs)
    mhc.mhc_boundary(norm=norm, **inputs)
    head = {key: inputs[key] for key in ("streams", "hc_eps", "norm_eps")}
    mhc.mhc_head(fn=inputs["fn"][:4], base=inputs["base"][:4], scale=inputs["scale"][:1], norm=norm, **head)


def main() -> None:
    compiled = record_launches(int(sys.argv[1]))
    from dsv4_kernels.cases import FLASH, PRO

    for name, shapes, num_tokens in (("pro", PRO, 1), ("flash", FLASH, 128)):
        compiled.clear()
        launch_mhc(name, shapes, num_tokens)
        for kernel in compiled:
            print(json.dumps(describe(kernel, f"{name}, {num_tokens} tokens")))


if __name__ == "__main__":
    main()
