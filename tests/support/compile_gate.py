"""Compiles an operation's Triton kernels for a GPU that is not here; prints what the compiler made of them.

    echo mhc | python tests/support/compile_gate.py 103     (90 = Hopper, 103 = GB300)

Each line of the input is an operation, answered with one line: a JSON list with an entry for each launch of
`launches/<operation>.py`, whose public functions run on CPU tensors of true shapes; a launch compiles instead.
A process of its own: TRITON_INTERPRET must not be set, and the stub driver stays.
"""

import functools
import importlib
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

from dsv4_kernels import dependent

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MATRIX = ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA")
CONVERSION = re.compile(r"\b(F2F|F2FP|F2I|I2F|I2FP)\b")
LABEL = re.compile(r"^(\.L\w+):", re.MULTILINE)
BRANCH = re.compile(r"\bBRA\b.*`\((\.L\w+)\)")
# What reads or writes memory that others see, or may leave the way from the first instruction to the wait unseen; not
# the call that ends a program without tensor memory (Triton 3.6).
VISIBLE = re.compile(
    r"\b(LD|LDG|LDGSTS|ST|STG|ATOM|ATOMG|RED|REDG|UBLKCP|UTMA\w+|BRX|CALL(?!.*guardrail_trap)|EXIT|RET)\b"
)
STEP = re.compile(r"[^;\n]*[A-Z][^;\n]*;")  # an instruction
ROLES = re.compile(r"\bBAR\.SYNC\S* 0x1 ;")  # where warps of other roles wait for the program's first ones
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
    dependent._can_launch_early = lambda device: True
    return compiled


def conversions(sass: str) -> int | None:
    """Instructions that change a number's format, in the innermost loops around matrix instructions; None without."""
    labels = {label[1]: label.start() for label in LABEL.finditer(sass)}
    branches = ((labels[branch[1]], branch.end()) for branch in BRANCH.finditer(sass) if branch[1] in labels)
    # A wait that is tried again stands behind the last EXIT and jumps back: no loop.
    loops = [(start, end) for start, end in branches if start < end and "EXIT" not in sass[start:end]]
    found = set()
    for matrix in re.finditer(rf"\b({'|'.join(MATRIX)})\b", sass):
        around = [(end - start, start) for start, end in loops if start <= matrix.start() < end]
        found |= {min(around)} if around else set()
    return sum(len(CONVERSION.findall(sass, start, start + size)) for size, start in found) if found else None


def waits_first(sass: str) -> bool:
    """Whether every program waits for the kernels before it, and reads and writes no memory until then.

    Each way from the first instruction is followed to the wait, or to the barrier at which warps of other roles stand
    until those of the first one, which waited, come there. Nor may a kernel take tensor memory behind the wait: it
    could wait for that of a program which waits for this kernel.
    """
    wait = re.search(r"\bACQBULK\b", sass)
    if wait is None or "FIND_AND_SET" in sass[wait.end() :]:
        return False
    labels = {label[1]: label.start() for label in LABEL.finditer(sass)}
    ways, seen, found = [0], set(), False
    while ways:
        at = ways.pop()
        if at in seen:
            continue
        seen.add(at)
        step = STEP.search(sass, at)
        if step is None or VISIBLE.search(step[0]):
            return False
        if "ACQBULK" in step[0]:
            found = True
        elif not ROLES.search(step[0]):
            branch = BRANCH.search(step[0])
            if branch is None or "@" in step[0]:
                ways.append(step.end())
            if branch is not None:
                ways.append(labels[branch[1]])
    return found


@functools.cache
def disassembled(cubin: bytes) -> tuple[str, str]:
    """Resources and machine code, as the tools print them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return usage, sass


def describe(kernel, run: str) -> dict:
    """Resources and matrix instructions of a compiled kernel."""
    usage, sass = disassembled(kernel.asm["cubin"])
    registers, stack, _, local = map(int, RESOURCES.search(usage).groups())
    matrix = {name: len(re.findall(rf"\b{name}\b", sass)) for name in MATRIX}
    return {
        "kernel": kernel.name,
        "run": run,
        "target": re.search(r"\.target (\S+)", kernel.asm["ptx"])[1].rstrip(","),
        "registers": registers,
        "stack_bytes": stack + local,
        "shared_bytes": kernel.metadata.shared,
        "tensor_memory_columns": getattr(kernel.metadata, "tmem_size", 0) or 0,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "loop_conversions": conversions(sass),
        "matrix_instructions": {name: count for name, count in matrix.items() if count},
        "launches_early": kernel.metadata.launch_pdl,
        "waits_first": waits_first(sass),
        "waits_for_products": len(re.findall(r"\bWARPGROUP\.DEPBAR\b", sass)),
    }


def main() -> None:
    capability = int(sys.argv[1])
    compiled = record_launches(capability)
    for operation in sys.stdin:
        launches = importlib.import_module(f"launches.{operation.strip()}")
        kernels = []
        for run in launches.RUNS:
            compiled.clear()
            launches.launch(run)
            for kernel in compiled:
                expected = launches.matrix_instructions(kernel.name, run, capability)
                kernels.append(describe(kernel, run) | {"expected_instructions": sorted(expected)})
        print(json.dumps(kernels), flush=True)


if __name__ == "__main__":
    main()
