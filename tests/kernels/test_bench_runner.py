"""benchmarks/kernels.py: what it runs, in which time, and what it makes of a worker that breaks."""

import importlib.util
import inspect
import json
import sys
import time
from pathlib import Path

import pytest

from dsv4_kernels import benching, cases

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("bench_runner", ROOT / "benchmarks/kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(op, **more):
    measured = benching.Measured(us=10.0, moved_bytes=16_000_000, flops=10**9, copy_rate=3.2e12, matmul_rate=8e14)
    return {
        "op": op,
        "implementation": "triton",
        "shapes": "pro",
        "num_tokens": 64,
        "us": measured.us,
        "gb_per_s": measured.gb_per_s,
        "tflop_per_s": measured.tflop_per_s,
        "times_floor": measured.times_floor,
        "bound": measured.bound,
        "torch": "2",
        "triton": "3",
        "device": "a GPU",
    } | more


def test_every_benchmark_is_run_and_takes_models_and_a_way_to_measure(runner):
    found = {path.parent.name for path in (ROOT / "kernels").glob("*/bench.py")}
    assert set(runner.OPS) == found == {path.parent.name for path in (ROOT / "kernels").glob("*/triton.py")}
    assert runner.MODELS == cases.MODELS
    for op in found:
        lines = importlib.import_module(f"dsv4_kernels.{op}.bench").lines
        assert list(inspect.signature(lines).parameters) == ["models", "measure"]


def test_a_worker_that_ends_costs_one_operation(runner):
    started = []

    def start(ops, seconds):
        started.append(list(ops))
        for op in ops:
            yield {"bench": op, "line": line(op)}
            if op == "b":
                return
            yield {"bench": op, "ended": "done"}

    messages = list(runner.measure_all(["a", "b", "c"], 100.0, start))
    assert started == [["a", "b", "c"], ["c"]]
    assert [message["bench"] for message in messages if "line" in message] == ["a", "b", "c"]
    ended = {message["bench"]: message["ended"] for message in messages if "ended" in message}
    assert ended == {"a": "done", "b": "its process ended", "c": "done"}


def test_an_operation_is_not_blamed_for_the_one_before_it(runner):
    def start(ops, seconds):
        yield {"bench": ops[0], "ended": "RuntimeError: an illegal access"}

    messages = list(runner.measure_all(["a", "b"], 100.0, start))
    assert [message["ended"] for message in messages] == ["RuntimeError: an illegal access"] * 2
    assert [message["bench"] for message in messages] == ["a", "b"]


def test_nothing_starts_when_the_time_is_over(runner):
    def start(ops, seconds):
        raise AssertionError

    messages = list(runner.measure_all(["a", "b"], 0.0, start))
    assert messages == [{"bench": op, "ended": runner.LATE} for op in "ab"]


def test_a_worker_is_killed_when_its_time_is_over_and_its_other_output_is_passed_on(runner, capsys):
    message = {"bench": "a", "line": {"op": "a"}}
    program = f"import time; print('hello'); print({json.dumps(message)!r}, flush=True); time.sleep(100)"
    begin = time.monotonic()
    assert list(runner.messages([sys.executable, "-c", program], {}, 3.0)) == [message]
    assert time.monotonic() - begin < 50
    assert "hello" in capsys.readouterr().err


def test_the_table_shows_the_rate_of_the_floor_that_binds(runner):
    compute = benching.Measured(us=10.0, moved_bytes=16, flops=6 * 10**9, copy_rate=3.2e12, matmul_rate=8e14)
    header, memory, other = runner.table([
        line("norm"), line("gemm", tflop_per_s=compute.tflop_per_s, bound=compute.bound, times_floor=1.333),
    ])  # fmt: skip
    assert header.split() == ["op", "implementation", "shapes", "tokens", "us", "rate", "x", "floor"]
    assert memory.split() == ["norm", "triton", "pro", "64", "10.0", "1600", "GB/s", "2.00"]
    assert other.split()[5:] == ["600.0", "TFLOP/s", "1.33"]


def test_a_record_says_what_ran_and_takes_the_commit_where_there_is_no_git(runner):
    record = runner.as_record(line("norm"), "abc123")
    assert record["commit"] == "abc123"
    assert record["device"] == "a GPU"
    assert record["settings"] == {
        "op": "norm", "implementation": "triton", "shapes": "pro", "num_tokens": 64, "torch": "2", "triton": "3",
    }  # fmt: skip
    assert record["results"]["us"] == 10.0
    assert not set(record["results"]) & {"device", "op"}


def test_compiling_calls_once_and_measures_nothing():
    calls = []
    measured = benching.compile_only([lambda: calls.append(1), lambda: calls.append(2)], 10, 20)
    assert calls == [1]
    assert measured.us != measured.us
