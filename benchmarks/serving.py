"""Throughput against interactivity of one engine: a closed loop of requests of fixed lengths, at rising concurrency.

    python3 benchmarks/serving.py $OUT/serving.jsonl --model pro-slice --lengths 1024/1024 8192/1024

Scheduler and runner in this process, as the engine drives them, without HTTP and without the sockets: what the engine
itself can do. One JSON line for each length and concurrency; the words mean what benchmarks/README.md says. A slice has
few of a model's layers (gpu_models.py): its tokens/s are not the model's. The exit code is 1 when a kernel was compiled
after the engine was ready. How to run it on the GPU machine is in gpu_smoke.py beside this file.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_models import MODELS, engine_config, start_results

from dsv4serve.cli.load import RequestRecord, summarize
from dsv4serve.cli.record import append_record, make_record
from dsv4serve.config import Device
from dsv4serve.obs.kernels import kernels
from dsv4serve.runner import build_runner
from tools.demo_model.loop import Loop, Prompt, Served

CONCURRENCY = (1, 4, 16, 64)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="JSONL file")
    add("--model", choices=MODELS, default="pro-slice", help="(default %(default)s)")
    add("--lengths", nargs="+", default=["1024/1024"], help="prompt / output tokens (default %(default)s)")
    add("--concurrency", type=int, nargs="+", default=CONCURRENCY, help="requests open at once (default %(default)s)")
    add("--rounds", type=int, default=1, help="requests of a run / concurrency, beside warm-up (default %(default)s)")
    add("--device", type=Device, default=Device.CUDA, help="cuda, or cpu for the demo (default %(default)s)")
    add("--cache-gib", type=float, default=8.0, help="of the cache (default %(default)s)")
    args = parser.parse_args(argv)
    lengths = [tuple(map(int, pair.split("/"))) for pair in args.lengths]
    config = engine_config(
        args.model,
        device=args.device,
        max_running_requests=max(args.concurrency),
        max_model_len=max(map(sum, lengths)),
        cache_bytes=int(args.cache_gib * 2**30),
        prefix_cache=False,
    )
    begin = time.perf_counter()
    loop = Loop(config, build_runner(config))
    start_s = time.perf_counter() - begin
    for num_input, num_output in lengths:
        for concurrency in args.concurrency:
            serve(loop, num_input, 4, concurrency, concurrency, seed=0)  # what was not warm is now
            loop.steps.clear()
            served = serve(loop, num_input, num_output, concurrency, args.rounds * concurrency, seed=1)
            full = [seconds for size, _, seconds in loop.steps if size == concurrency]
            results = summarize([record(one, num_input) for one in served])
            results |= {"decode_step_ms": round(1e3 * median(full), 3) if full else None} | start_results(start_s)
            settings = {"model": args.model, "input": num_input, "output": num_output, "concurrency": concurrency,
                        "rounds": args.rounds}  # fmt: skip
            append_record(args.out, make_record(sys.argv, "", settings, results))
            shown = ("output_tokens_per_s", "total_tokens_per_s", "interactivity", "decode_step_ms")
            print(f"{num_input}/{num_output} x {concurrency}:", {name: results[name] for name in shown}, flush=True)
    if kernels.num_late:
        print(f"{kernels.num_late} kernels were compiled or loaded after the engine was ready (see the log): its start "
              "must run every form", file=sys.stderr)  # fmt: skip
    return int(kernels.num_late > 0)


def serve(loop: Loop, num_input: int, num_output: int, concurrency: int, num_requests: int, seed: int) -> list[Served]:
    """Requests of random tokens, `concurrency` of them open at any time."""
    draw = random.Random(f"{seed} {num_input} {concurrency}")
    ids = range(2, loop.runner.vocab_size)
    prompts: list[Prompt] = [(draw.choices(ids, k=num_input), num_output) for _ in range(num_requests)]
    return loop.serve(prompts, concurrency, ignore_eos=True)


def record(one: Served, num_input: int) -> RequestRecord:
    """A request as the definitions of `dsv4serve bench` count it."""
    return RequestRecord(
        start_s=one.added_at,
        first_s=one.times[0],
        last_s=one.times[-1],
        end_s=one.times[-1],
        num_input_tokens=num_input,
        num_output_tokens=len(one.ids),
        gaps_s=[after - before for before, after in pairwise(one.times)],
    )


if __name__ == "__main__":
    sys.exit(main())
