"""What the compilers make of every Triton kernel for Hopper and GB300: the first table of docs/performance.md.

    .venv/bin/python benchmarks/compiled_kernels.py [OPERATION ..]

Runs the compile gate (tests/support/compile_gate.py) for each operation and target; needs no GPU, and some minutes.
Kernels of one operation with equal numbers share a row, which names the first run.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parents[1] / "tests/support"
TARGETS = {90: "sm_90a", 103: "sm_103a"}
Kernel = dict[str, Any]  # an entry of the compile gate's answer


def compiled(operation: str, capability: int) -> list[Kernel]:
    """What the gate answers, in the order of launches."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    command = [sys.executable, SUPPORT / "compile_gate.py", str(capability)]
    run = subprocess.run(command, env=environment, input=operation, capture_output=True, text=True, check=True)
    kernels: list[Kernel] = json.loads(run.stdout)
    return kernels


def cells(kernel: Kernel | None) -> str:
    """Numbers of one kernel on one target, which may do without it."""
    if kernel is None:
        return "- | - | - | - | -"
    instructions = ", ".join(f"{count} {name}" for name, count in kernel["matrix_instructions"].items())
    shared = f"{kernel['shared_bytes'] / 1024:.1f}"
    if kernel["tensor_memory_columns"]:
        shared += f" + {kernel['tensor_memory_columns']}"
    return f"{kernel['warps']} | {kernel['stages']} | {kernel['registers']} | {shared} | {instructions or '-'}"


def rows(operation: str, hopper: Iterable[Kernel], blackwell: Iterable[Kernel]) -> Iterator[str]:
    """Markdown rows of an operation's kernels at Pro and Flash shapes, both targets beside each other."""
    launches: dict[tuple[str, str], tuple[list[Kernel], list[Kernel]]] = {}
    for side, kernels in enumerate((hopper, blackwell)):
        for kernel in kernels:
            launches.setdefault((kernel["kernel"], kernel["run"]), ([], []))[side].append(kernel)
    runs: dict[str, list[str]] = {}
    for (name, run), both in launches.items():
        for left, right in itertools.zip_longest(*both):
            if "demo" not in run:
                runs.setdefault(f"`{name}` | {cells(left)} | {cells(right)}", []).append(run)
    for key, names in runs.items():
        kernel, numbers = key.split(" | ", 1)
        others = len(set(names)) - 1
        yield f"| {operation} | {kernel} | {names[0]}{f' (+{others})' if others else ''} | {numbers} |"


def table(operations: Iterable[str]) -> Iterator[str]:
    """The whole table."""
    left, right = (f"{name} warps | stages | registers | shared KiB{more} | matrix instructions" for name, more in (
        (TARGETS[90], ""), (TARGETS[103], " + tensor memory columns"),
    ))  # fmt: skip
    yield f"| operation | kernel | run | {left} | {right} |"
    yield "|" + "---|" * 13
    for operation in operations:
        yield from rows(operation, *(compiled(operation, capability) for capability in TARGETS))


if __name__ == "__main__":
    found = sorted(path.stem for path in SUPPORT.glob("launches/[a-z]*.py"))
    for row in table(sys.argv[1:] or found):
        print(row, flush=True)
