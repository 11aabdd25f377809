"""Time of schedule() + update() of a step in which every request decodes, without a model.

    python benchmarks/scheduler_step.py --out benchmarks/results/scheduler-step.jsonl

The runner is a list of constants, so what is measured is the scheduler alone, page growth and tails included. One JSON
line per metric is appended to --out.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

from dsv4serve.cli.record import append_record, make_record
from dsv4serve.scheduler import Scheduler
from dsv4serve.types import PAGE_TOKENS, Request, SamplingParams, SchedulerOutput, StepOutput

TOKEN = [7]


def execute(step: SchedulerOutput) -> StepOutput:
    slots = [chunk.slot for chunk in step.chunks if chunk.samples] + step.decodes
    return StepOutput(step_id=step.step_id, slots=slots, token_ids=[TOKEN] * len(slots))


def measure(num_running: int, num_steps: int) -> list[float]:
    """Seconds of each of `num_steps` steps with `num_running` decodes; positions are spread over the page."""
    pages_per_request = (PAGE_TOKENS + num_steps) // PAGE_TOKENS + 2
    scheduler = Scheduler(
        num_slots=num_running,
        num_pages=num_running * pages_per_request,
        num_tails=num_running,
        max_model_len=pages_per_request * PAGE_TOKENS,
        max_step_tokens=8192,
        eos_token_id=0,
        max_waiting=num_running,
    )
    for index in range(num_running):
        sampling = SamplingParams(max_tokens=1 << 30)
        scheduler.add(Request(request_id=f"r{index}", prompt_ids=[index + 1] * (1 + index % 255), sampling=sampling))
    while scheduler.stats().num_waiting:
        step = scheduler.schedule()
        assert step is not None
        scheduler.update(step, execute(step))
    seconds = []
    gc.collect()
    gc.freeze()  # the engine does the same after start-up
    for _ in range(num_steps):
        before = time.perf_counter()
        step = scheduler.schedule()
        planned = time.perf_counter()
        assert step is not None
        result = execute(step)
        executed = time.perf_counter()
        outputs = scheduler.update(step, result)
        seconds.append(planned - before + time.perf_counter() - executed)
        assert len(outputs) == num_running
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="scheduler step time with a fake runner")
    parser.add_argument("--out", type=Path, help="JSONL file to append to; default: print only")
    parser.add_argument("--num-running", type=int, nargs="+", default=[1, 16, 256, 1024], help="decoding requests")
    parser.add_argument("--num-steps", type=int, default=600, help="measured steps")
    args = parser.parse_args()
    for num_running in args.num_running:
        seconds = sorted(measure(num_running, args.num_steps))
        percentiles = {"p50": seconds[len(seconds) // 2], "p99": seconds[len(seconds) * 99 // 100]}
        for name, value in percentiles.items():
            results = {"metric": f"scheduler_step_{name}", "value": round(value * 1e3, 4), "unit": "ms"}
            settings = {"num_running": num_running, "num_steps": args.num_steps}
            print(f"{num_running} running: {results['metric']} {results['value']} ms")
            if args.out is not None:
                append_record(args.out, make_record(["python", *sys.argv], "", settings, results))


if __name__ == "__main__":
    main()
