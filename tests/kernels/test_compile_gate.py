"""Every Triton kernel compiles for Hopper and for GB300 at true shapes, with everything in registers but for STACK."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.compile_gate import waits_first

SUPPORT = Path(__file__).parents[1] / "support"
OPERATIONS = sorted(path.stem for path in SUPPORT.glob("launches/[a-z]*.py"))
KERNELS = Path(__file__).parents[2] / "kernels"
MAX_SHARED_BYTES = 227 << 10
MAX_TENSOR_MEMORY_COLUMNS = 512  # with more Triton 3.9 compiles a kernel that does nothing


WAIT = "BAR.SYNC ;\n.L_x_0:\n ACQBULK ;\n PREEXIT ;\n LDG.E R2 ;\n.L_x_1:\n EXIT ;\n"


@pytest.mark.parametrize(
    ("sass", "expected"),
    [
        (WAIT, True),
        ("@P0 BRA `(.L_x_0) ;\n" + WAIT, True),  # a short way to the wait
        ("@P0 BRA `(.L_x_1) ;\n" + WAIT, False),  # one around it
        ("@P0 EXIT ;\n" + WAIT, False),
        ("STG.E R2 ;\n" + WAIT, False),
        ("UTCATOMSWS.FIND_AND_SET.ALIGN ;\n" + WAIT, True),
        (WAIT + "UTCATOMSWS.FIND_AND_SET.ALIGN ;\n", False),
        (WAIT.replace("ACQBULK", "NOP"), False),
        ("@P0 BRA `(.L_x_0) ;\n BAR.SYNC.DEFER_BLOCKING 0x1 ;\n LDS R2 ;\n" + WAIT, True),  # another role
        ("@P0 BRA `(.L_x_0) ;\n LDG.E R2 ;\n BAR.SYNC.DEFER_BLOCKING 0x1 ;\n" + WAIT, False),
        ("BAR.SYNC.DEFER_BLOCKING 0x1 ;\n" + WAIT, False),  # nobody waits
    ],
)
def test_machine_code_that_does_not_wait_first_is_found(sass, expected):
    assert waits_first(sass) == expected


def test_each_operation_with_triton_kernels_is_compiled():
    assert sorted(path.parent.name for path in KERNELS.glob("*/triton.py")) == OPERATIONS


class Gates:
    """A process for each capability, which serves all operations; another one behind one that failed."""

    def __init__(self, folder):
        self.folder, self.idle = folder, {}

    def start(self, capability):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["TRITON_DEFAULT_FP_FUSION"] = "1"
        command = [sys.executable, SUPPORT / "compile_gate.py", str(capability)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with (self.folder / str(capability)).open("w") as errors:
            return subprocess.Popen(command, env=environment, stderr=errors, text=True, **pipes)

    def compile(self, capability, operation):
        gate = self.idle.pop(capability, None) or self.start(capability)
        try:
            gate.stdin.write(operation + "\n")
            gate.stdin.flush()
            answer = gate.stdout.readline()
            assert answer, (self.folder / str(capability)).read_text()
        except BaseException:  # among others, the test's time is over: the answer may come to the next one
            self.end(gate)
            raise
        self.idle[capability] = gate
        return json.loads(answer)

    def end(self, gate):
        gate.kill()
        gate.communicate()


@pytest.fixture(scope="module")
def gates(tmp_path_factory):
    gates = Gates(tmp_path_factory.mktemp("gates"))
    yield gates
    for gate in gates.idle.values():
        gates.end(gate)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("capability", "target"), [(90, "sm_90a"), (103, "sm_103a")])
def test_kernels_compile_without_stack_and_on_the_tensor_cores(gates, operation, capability, target):
    kernels = gates.compile(capability, operation)
    launches = importlib.import_module(f"support.launches.{operation}")
    elsewhere = getattr(launches, "HOPPER", set()) if capability != 90 else set()
    assert {kernel["kernel"] for kernel in kernels} == launches.KERNELS - elsewhere
    unconverted = getattr(launches, "UNCONVERTED", set())
    plain = getattr(launches, "PLAIN", set())
    assert unconverted | plain <= launches.KERNELS
    stack = getattr(launches, "STACK", {})
    for kernel in kernels:
        assert kernel["target"] == target
        assert kernel["stack_bytes"] <= stack.get(kernel["kernel"], 0), kernel
        assert kernel["shared_bytes"] <= MAX_SHARED_BYTES, kernel
        assert kernel["tensor_memory_columns"] <= MAX_TENSOR_MEMORY_COLUMNS, kernel
        found = kernel["matrix_instructions"]
        assert sorted(found) == kernel["expected_instructions"], kernel
        assert kernel["kernel"] not in unconverted or kernel["loop_conversions"] == 0, kernel
        # A kernel that may begin before the one ahead of it is complete (docs/adr/0009) waits before anything else.
        assert kernel["launches_early"] == kernel["waits_first"] == (kernel["kernel"] not in plain), kernel
        # Hopper's products run beside other instructions. Where the compiler sees a way around a loop whose sums they
        # are, it waits for each of them. `out_proj` has one that waits, at 512 tokens.
        warpgroup = found.get("HGMMA", 0) + found.get("QGMMA", 0)
        assert kernel["waits_for_products"] < max(1, warpgroup) or operation == "out_proj", kernel
