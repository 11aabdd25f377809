"""One decode step and one prefill chunk of the device engine by kernel: times, launches, and how long the GPU idles.

Writes a JSON line per step: device time and launches of each kernel (summed over layers), their sum, and the time from
the first to the last of them, which profiling makes longer. So a decode is timed again without it, each step submitted
while the one before it runs, as the engine does; what kernels do not fill of that is idle. How to run it on the GPU
machine is in gpu_smoke.py beside this file.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_models import MODELS, Driver, build, start_results
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dsv4serve.cli.record import append_record, make_record
from dsv4serve.types import PAGE_TOKENS

BATCHES = (1, 16, 64)
CHUNK = 1024
NUM_STEPS = 50
CONTEXT = 4096  # tokens before the step


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSONL file")
    parser.add_argument("--model", choices=MODELS, default="pro-slice")
    args = parser.parse_args(argv)
    driver = build(args.model, max_running_requests=max(BATCHES), max_model_len=8192, max_step_tokens=CHUNK,
                   cache_bytes=4 << 30)  # fmt: skip
    context = min(CONTEXT, driver.longest - CHUNK - PAGE_TOKENS) // PAGE_TOKENS * PAGE_TOKENS
    for name, run in steps(driver, context):
        run()  # what was not warm is now
        results = by_kernel(run)
        if name.startswith("decode"):
            step_us = 1e3 * driver.decode_ms(list(range(int(name.split()[1]))), NUM_STEPS)
            results |= {"step_us": round(step_us, 1), "idle_share": round(1 - results["busy_us"] / step_us, 4)}
        results |= start_results(driver.start_s)
        settings = {"model": args.model, "step": name, "context": context}
        append_record(args.out, make_record(sys.argv, "", settings, results))
        print(name, {key: value for key, value in results.items() if key != "kernels"})
        for kernel, numbers in list(results["kernels"].items())[:15]:
            print(f"  {numbers['us']:>9.1f} us {numbers['launches']:>5} x {kernel}")
    return 0


def steps(driver: Driver, context: int) -> list[tuple[str, Callable[[], object]]]:
    """Name and one step of each kind. Each call goes on where the last one ended, with all requests at `context`."""
    for slot in range(max(BATCHES)):
        driver.begin(slot, [3 + 17 * slot], context)
    kinds: list[tuple[str, Callable[[], object]]] = [
        (f"decode {batch}", lambda slots=list(range(batch)): driver.decode(slots)) for batch in BATCHES
    ]
    ids = torch.randint(2, driver.runner.vocab_size, (CHUNK,), generator=torch.Generator().manual_seed(1)).tolist()
    kinds.append((f"prefill {CHUNK}", lambda: driver.begin(0, ids, context)))
    return kinds


def by_kernel(run: Callable[[], object]) -> dict[str, Any]:
    """What one call runs on the GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    spans = []
    for event in recorded.events():
        if event.device_type != DeviceType.CUDA:  # two objects of one value
            continue
        took = event.time_range.end - event.time_range.start
        kernels[event.name][0] += took
        kernels[event.name][1] += 1
        spans.append((event.time_range.start, event.time_range.end))
    if not spans:
        raise SystemExit("the profiler saw no kernel: CUPTI is missing or in use")
    spans.sort()
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    span = end - spans[0][0]
    ordered = sorted(kernels.items(), key=lambda item: -item[1][0])
    return {
        "span_us": round(span, 1),
        "busy_us": round(busy, 1),
        "launches": len(spans),
        "kernels": {name: {"us": round(us, 1), "launches": count} for name, (us, count) in ordered},
    }


if __name__ == "__main__":
    sys.exit(main())
