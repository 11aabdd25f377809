"""Times every kernel on a GPU against its floor, and prints one table.

    python3 benchmarks/kernels.py --seconds 480

On a machine that has only torch, triton and numpy, from a copy of the tree without git, all that it needs:

    python3 benchmarks/kernels.py --seconds 480 --commit "$(cat COMMIT)" --out out/kernels.jsonl

First every `kernels/*/bench.py` runs once, several at a time and without measuring, so that Triton compiles everything
into its cache; this takes at most 180 s. Then one process measures one operation after another; nothing else may run on
the card meanwhile. An operation takes at most twice its share of the time that is left, and what was measured by then
stays. Should it break the process, the next one goes on with the operation after it.

Lines have the form of `dsv4serve/cli/record.py`. Exit code 1 if an operation failed. Neither process needs dsv4serve or
dsv4_kernels to be installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsv4serve.cli.record import append_record, make_record  # noqa: E402  # not installed on a GPU machine

# What a decode step takes longest for comes first: it is measured even when time is short.
OPS = (
    "mega_moe", "sparse_attention", "gemm", "out_proj", "indexer", "mhc", "kv_store", "compressor", "router", "norm",
    "quant", "sampling", "spec_accept", "metadata", "rope",
)  # fmt: skip
MODELS = ("pro", "flash")
COMPILE_S = 180.0  # most that compiling may take
SETTINGS = ("op", "implementation", "shapes", "num_tokens", "torch", "triton")
DONE, LATE = "done", "out of time"

Message = dict[str, Any]  # {"bench": name, "line": {..}} or {"bench": name, "ended": why}


def work(ops: Sequence[str], models: Sequence[str], seconds: float, compile_only: bool) -> Iterator[Message]:
    """What a worker process does: the lines of each operation, and how it ended."""
    import torch
    import triton

    from dsv4_kernels import benching

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if compile_only:
        benching.MAX_COPIES = 1
    end = time.monotonic() + seconds
    for index, op in enumerate(ops):
        left = end - time.monotonic()
        until = time.monotonic() + min(left, 2 * left / (len(ops) - index))
        ended = DONE
        try:
            torch.manual_seed(0)
            bench = importlib.import_module(f"dsv4_kernels.{op}.bench")
            for line in bench.lines(models, benching.compile_only if compile_only else benching.measure):
                yield {"bench": op, "line": line | versions}
                if time.monotonic() > until:
                    ended = LATE
                    break
        except Exception as error:
            ended = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        yield {"bench": op, "ended": ended}
        try:
            torch.cuda.synchronize()
        except Exception:
            return  # after an illegal access nothing more can be measured in this process
        torch.cuda.empty_cache()


def messages(command: Sequence[str], environment: dict[str, str], seconds: float) -> Iterator[Message]:
    """What a worker says, until it ends or `seconds` are over; then it is killed. Its other output goes to stderr."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    end = time.monotonic() + seconds
    try:
        while (line := lines.get(timeout=max(end - time.monotonic(), 0.001))) is not None:
            if line.startswith('{"bench"'):
                yield json.loads(line)
            else:
                print(line, end="", file=sys.stderr)
    except queue.Empty:
        pass
    finally:
        process.kill()
        process.wait()


def measure_all(
    ops: Sequence[str], seconds: float, start: Callable[[Sequence[str], float], Iterable[Message]]
) -> Iterator[Message]:
    """Messages of as many workers as it takes: `start` runs one for the operations and seconds that are left."""
    end, left = time.monotonic() + seconds, list(ops)
    while left:
        remaining = end - time.monotonic()
        message: Message = {}
        for message in start(list(left), remaining) if remaining > 0 else ():
            if "ended" in message:
                left.remove(message["bench"])
            yield message
        if left and "ended" not in message:  # it ended while it was at the next one, or did not begin
            yield {"bench": left.pop(0), "ended": LATE if time.monotonic() >= end else "its process ended"}


def table(lines: Iterable[dict[str, Any]]) -> list[str]:
    """One row for each line: the rate is that of the floor which binds."""
    rows = [("op", "implementation", "shapes", "tokens", "us", "rate", "x floor")]
    for line in lines:
        rate = f"{line['gb_per_s']:.0f} GB/s" if line["bound"] == "bytes" else f"{line['tflop_per_s']:.1f} TFLOP/s"
        names = line["op"], line["implementation"], line["shapes"], str(line["num_tokens"])
        rows.append((*names, f"{line['us']:.1f}", rate, f"{line['times_floor']:.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < 3 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def as_record(line: dict[str, Any], commit: str) -> dict[str, Any]:
    """The JSON line of a measurement."""
    settings = {key: line[key] for key in SETTINGS}
    results = {key: value for key, value in line.items() if key not in (*SETTINGS, "device")}
    record = make_record(["python3", *sys.argv], line["device"], settings, results)
    return record | ({"commit": commit} if commit else {})


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="times of all kernels on this GPU against their floors")
    parser.add_argument("--ops", default=",".join(OPS), help="which operations, in this order (default: %(default)s)")
    parser.add_argument("--models", default=",".join(MODELS), help="whose shapes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=480.0, help="most that everything may take (default: 480)")
    parser.add_argument("--commit", default="", help="where there is no git: the commit of this tree")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/kernels.jsonl", help="file to append to")
    parser.add_argument("--work", choices=["compile", "measure"], help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = build_parser().parse_args()
    ops, models = args.ops.split(","), args.models.split(",")
    if unknown := sorted({*ops, *models} - {*OPS, *MODELS}):
        print(f"{unknown}: not one of {', '.join(OPS)}, nor of {', '.join(MODELS)}", file=sys.stderr)
        return 2
    if args.work:
        for message in work(ops, models, args.seconds, args.work == "compile"):
            print(json.dumps(message), flush=True)
        return 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as links:
        (Path(links) / "dsv4_kernels").symlink_to(ROOT / "kernels")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([links, os.environ.get("PYTHONPATH", "")])}

        def start(kind: str, some: Sequence[str], names: Sequence[str], seconds: float) -> Iterator[Message]:
            command = [sys.executable, __file__, "--work", kind, "--seconds", str(seconds), "--ops", ",".join(some)]
            return messages([*command, "--models", ",".join(names)], environment, seconds)

        compiled_by = begin + min(COMPILE_S, args.seconds / 2)

        def compile_(op: str, name: str) -> list[Message]:
            return list(start("compile", [op], [name], max(compiled_by - time.monotonic(), 0.0)))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiling = [pool.submit(compile_, op, name) for op in ops for name in models]
        for message in (message for job in compiling for message in job.result() if "ended" in message):
            if message["ended"] != DONE:
                print(f"compiling {message['bench']}: {message['ended']}", file=sys.stderr)
        print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)

        lines, failed = [], False
        left = args.seconds - (time.monotonic() - begin)
        for message in measure_all(ops, left, lambda some, seconds: start("measure", some, models, seconds)):
            if "ended" in message:
                failed |= message["ended"] not in (DONE, LATE)
                print(f"{message['bench']}: {message['ended']}", flush=True)
            else:
                lines.append(message["line"])
                append_record(args.out, as_record(message["line"], args.commit))
    print("\n".join(table(lines)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
