"""Decode steps with kernels launched early (docs/adr/0009) and without, in turns: the same bits, and their times.

One JSON line for each model and batch, times by turn: of steps submitted one ahead of the host, and of the graph alone.
Before that a graph of early launches is replayed CHECKS times against the step whose kernels run one after the other,
eagerly and from the same cache; a bit that differs ends this with an error. How to run it on the GPU machine is in
gpu_smoke.py beside this file.
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSONL file")
    parser.add_argument("--models", nargs="*", default=["demo", "pro-rank"], help="of gpu_models.py")
    parser.add_argument("--turns", type=int, default=3, help="of both (default %(default)s)")
    args = parser.parse_args(argv)
    for name in args.models:
        driver = build(name, max_running_requests=max(BATCHES), max_model_len=4096, max_step_tokens=256,
                       cache_bytes=CACHE_BYTES)  # fmt: skip
        times: dict[int, dict[str, Any]] = {batch: {"early": [], "one_by_one": []} for batch in BATCHES}
        for turn in range(args.turns):
            for kind, enabled in (("early", True), ("one_by_one", False)):
                capture(driver, enabled)
                for batch in BATCHES:
                    rate = decode_rate(driver, batch)
                    times[batch][kind].append((rate["step_ms"], rate["graph_ms"]))
                    if enabled and turn == 0:
                        check(driver, batch)
        for batch, found in times.items():
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


def capture(driver: Driver, enabled: bool) -> None:
    """Give the driver's decodes graphs with early launches, or with none."""
    runner = driver.runner
    runner.graphs = graphs = StepGraphs(runner.forward, runner.num_slots, max(BATCHES), num_draft_tokens=0)
    graphs.buckets = [bucket_for([1] * batch, runner.num_slots) for batch in BATCHES]
    with mock.patch.object(dependent, "ENABLED", enabled):
        graphs.capture()


def check(driver: Driver, batch: int) -> None:
    """The graph of early launches has the bits of the last step with its kernels one after the other."""
    with mock.patch.object(dependent, "ENABLED", False):
        for _ in range(CHECKS):
            check_replay(driver.runner, bucket_for([1] * batch, driver.runner.num_slots))


if __name__ == "__main__":
    sys.exit(main())
