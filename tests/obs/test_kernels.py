"""What the counter counts of what Triton says, as Triton says it."""

import logging
import os
import subprocess
import sys
import time
import types

import pytest
from triton.compiler.compiler import CompileTimer

from dsv4serve.obs.kernels import SERVING, START_UP, KernelCounter, process_age_s

SOURCE = types.SimpleNamespace(name="_scores", signature={"x": "*fp32"}, constants={(1,): 16})


def say(counter: KernelCounter, cache_hit: bool, seconds: float = 0.0) -> None:
    """A call of the listener in `triton.compiler.compile`, after so much time."""
    timer = CompileTimer()
    timer.start -= seconds
    counter.observe(src=SOURCE, metadata={}, metadata_group={}, times=timer.end(), cache_hit=cache_hit)


def test_kernels_are_counted_by_phase_and_late_ones_are_named(caplog):
    counter = KernelCounter()
    say(counter, cache_hit=False, seconds=2.0)
    say(counter, cache_hit=True)
    counter.serve()
    assert not caplog.records
    assert counter.num_late == 0
    say(counter, cache_hit=False, seconds=1.0)
    say(counter, cache_hit=True)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "the kernel _scores was compiled in 1.00 s while requests waited" in caplog.messages[0]
    assert "the kernel _scores was loaded in" in caplog.messages[1]
    assert counter.num_late == 2
    counter.start_up()  # a second engine in this process
    say(counter, cache_hit=True)
    found = {phase: (counts.compiled, counts.loaded) for phase, counts in counter.phases.items()}
    assert found == {START_UP: (1, 2), SERVING: (1, 1)}
    assert counter.phases[START_UP].seconds == pytest.approx(2.0, abs=0.1)


COMPILE = """
import triton
from support.compile_gate import record_launches
from dsv4serve.obs.kernels import kernels
record_launches(90)
triton.knobs.compilation.listener = kernels.observe
import torch
from dsv4_kernels.norm import triton as norm
x, weight = torch.zeros(4, 256, dtype=torch.bfloat16), torch.ones(256)
for forget in (False, False, True):
    if forget:  # as a new process
        norm._rms_norm.device_caches.clear()
    norm.rms_norm_fp8(x, weight, 1e-6)
    made = kernels.phases["start-up"]
    print(made.compiled, made.loaded, made.seconds > 0.05)
"""


def test_triton_tells_of_each_kernel_that_it_compiles_or_loads(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["1 0 True", "1 0 True", "1 1 True"]


def test_a_process_knows_its_age():
    begin = time.time()
    code = "import time; time.sleep(0.5); from dsv4serve.obs.kernels import process_age_s; print(process_age_s())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.5 <= float(done.stdout) <= time.time() - begin + 0.1  # clock ticks of 10 ms
    assert process_age_s() > 0
