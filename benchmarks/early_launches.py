"""Decode steps with kernels launched early (docs/adr/0009) and without, in turns: the same bits, and their times.

One JSON line for each model and batch, times by turn: of steps submitted one ahead of the host, and of the graph alone.
Before that a graph of early launches is replayed CHECKS times against the step whose kernels run one after the other,
eagerly and from the same cache; a bit that differs ends this with an error. How to run it on the GPU machine is in
gpu_smoke.py beside this file. Each kind compiles all kernels anew, about a minute: `--kinds KIND --turns 0` beside each
other fill Triton's cache first.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gpu_models import Driver, build
from gpu_smoke import BATCHES, CACHE_BYTES, CONTEXT, decode_rate
from support.device_engine import check_replay

from dsv4_kernels import dependent
from dsv4serve.cli.record import append_record, make_record
from dsv4serve.runner.graphs import StepGraphs, bucket_for

CHECKS = 10
KINDS = {"early": True, "one_by_one": False}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSONL file")
    parser.add_argument("--models", nargs="*", default=["demo", "pro-rank"], help="of gpu_models.py")
    parser.add_argument("--turns", type=int, default=3, help="of each kind; 0 only compiles (default %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="default all")
    args = parser.parse_args(argv)
    for name in args.models:
        with of_kind(args.kinds[0]):
            driver = build(name, max_running_requests=max(BATCHES), max_model_len=4096, max_step_tokens=256,
                           cache_bytes=CACHE_BYTES)  # fmt: skip
        times: dict[int, dict[str, Any]] = {batch: {kind: [] for kind in args.kinds} for batch in BATCHES}
        for turn in range(max(1, args.turns)):
            for kind in args.kinds:
                capture(driver, kind)
                for batch in BATCHES if args.turns else ():
                    rate = decode_rate(driver, batch)
                    times[batch][kind].append((rate["step_ms"], rate["graph_ms"]))
                    if turn == 0 and kind != "one_by_one":
                        check(driver, batch)
        for batch, found in times.items() if args.turns else ():
            medians = {kind: [sorted(each)[len(each) // 2] for each in zip(*pairs, strict=True)]
                       for kind, pairs in found.items()}  # fmt: skip
            results = {"same_bits": True, "step_and_graph_ms": medians, "turns": found}
            settings = {"model": name, "context": CONTEXT, "batch": batch}
            append_record(args.out, make_record(sys.argv, "", settings, results))
            print(name, batch, medians, flush=True)
        del driver
        gc.collect()
        torch.cuda.empty_cache()
    return 0


def of_kind(kind: str) -> Any:
    """Launches of this kind, while it is entered."""
    return mock.patch.object(dependent, "ENABLED", KINDS[kind])


def capture(driver: Driver, kind: str) -> None:
    """Give the driver's decodes graphs of one kind."""
    runner = driver.runner
    runner.graphs = graphs = StepGraphs(runner.forward, runner.num_slots, max(BATCHES), num_draft_tokens=0)
    graphs.buckets = [bucket_for([1] * batch, runner.num_slots) for batch in BATCHES]
    with of_kind(kind):
        graphs.capture()


def check(driver: Driver, batch: int) -> None:
    """The graph of early launches has the bits of the last step with its kernels one after the other."""
    with of_kind("one_by_one"):
        for _ in range(CHECKS):
            check_replay(driver.runner, bucket_for([1] * batch, driver.runner.num_slots))


if __name__ == "__main__":
    sys.exit(main())
