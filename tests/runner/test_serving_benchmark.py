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
