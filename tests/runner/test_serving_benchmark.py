"""The serving benchmark runs, on the CPU with the embedded model, and counts what it says it counts."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_closed_loop_counts_every_token(tmp_path):
    out = tmp_path / "serving.jsonl"
    options = ["--model", "demo", "--device", "cpu", "--lengths", "20/6", "--concurrency", "1", "3", "--rounds", "2"]
    command = [sys.executable, str(ROOT / "benchmarks/serving.py"), str(out), *options, "--cache-gib", "0.1"]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["settings"]["concurrency"] for line in lines] == [1, 3]
    for line in lines:
        concurrency, results = line["settings"]["concurrency"], line["results"]
        assert results["num_completed"] == 2 * concurrency
        assert results["num_input_tokens"] == 2 * concurrency * 20
        assert results["num_output_tokens"] == 2 * concurrency * 6
        assert 0 < results["decode_step_ms"] <= results["e2e_ms"]["mean"]
        assert results["interactivity"] > 0
        assert results["ready_s"] > results["start_s"] > 0
        nothing = {"compiled": 0, "loaded": 0, "seconds": 0.0}
        assert results["kernels_made"] == {"start-up": nothing, "serving": nothing}


LATE = """
import sys
sys.path.insert(0, "benchmarks")
from dsv4serve.obs.kernels import kernels
import serving
kernels.phases["serving"].compiled = 1
sys.exit(serving.main(sys.argv[1:]))
"""


def test_a_kernel_that_came_late_fails_the_run(tmp_path):
    options = ["--model", "demo", "--device", "cpu", "--lengths", "5/2", "--concurrency", "1", "--cache-gib", "0.1"]
    command = [sys.executable, "-c", LATE, str(tmp_path / "serving.jsonl"), *options]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "1 kernels were compiled or loaded after the engine was ready" in done.stderr
