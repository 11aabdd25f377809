"""Decode steps and fresh prompts of the slices that SGLang was measured with, beside its times (peer_h200.json).

    python3 benchmarks/peer.py $OUT/peer.jsonl --models flash-8 pro-8

As there: true layer shapes, random weights, so that tokens spread over the experts; no drafts, no prefix cache. A
decode step is the mean of many that are submitted one ahead of the host, as the engine does; a prompt is one step of
8,192 tokens, from the plan to its first token on the host. Other slices (`pro-4` fits one H100) have no peer: compare
per layer.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_models import Driver, build

from dsv4serve.cli.record import append_record, make_record

CONTEXTS = (1024, 8192)
BATCHES = (1, 16, 64, 128, 256)
PROMPT = 8192
NUM_STEPS, NUM_PROMPTS = 30, 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSONL file")
    parser.add_argument("--models", nargs="+", default=["flash-8", "pro-8"], help="model-layers (default: %(default)s)")
    parser.add_argument("--cache-gib", type=float, default=6.0, help="of the cache (default: %(default)s)")
    args = parser.parse_args(argv)
    peer = json.loads(Path(__file__).with_name("peer_h200.json").read_text("utf-8"))
    for name in args.models:
        driver = build(
            name,
            max_running_requests=max(BATCHES),
            max_model_len=PROMPT + 1024,
            max_step_tokens=PROMPT,
            cache_bytes=int(args.cache_gib * 2**30),
        )
        print(f"{name}: ready after {driver.start_s:.1f} s", flush=True)
        theirs = peer["prefill_ms"].get(name)
        _record(args.out, name, {"prompt": PROMPT}, prompt_ms(driver), theirs, {"start_s": round(driver.start_s, 1)})
        for context in CONTEXTS:
            for slot in range(max(BATCHES)):
                driver.begin(slot, [3 + 17 * slot], context)
            for batch in BATCHES:
                theirs = peer["decode_ms"].get(name, {}).get(str(context), {}).get(str(batch))
                _record(
                    args.out,
                    name,
                    {"context": context, "batch": batch},
                    driver.decode_ms(list(range(batch)), NUM_STEPS),
                    theirs,
                    {},
                )
        del driver
        gc.collect()
        torch.cuda.empty_cache()
    return 0


def _record(
    out: Path, name: str, settings: dict[str, Any], ours: float, theirs: float | None, more: dict[str, Any]
) -> None:
    results = more | {"ms": round(ours, 3), "sglang_h200_ms": theirs}
    results["times_as_fast"] = None if theirs is None else round(theirs / ours, 2)
    append_record(out, make_record(sys.argv, "", {"model": name} | settings, results))
    print(name, settings, results, flush=True)


def prompt_ms(driver: Driver) -> float:
    """A step that is a fresh prompt."""
    times = []
    for number in range(1 + NUM_PROMPTS):
        ids = random.Random(number).choices(range(2, driver.runner.vocab_size), k=PROMPT)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        driver.begin(number, ids)
        times.append(time.perf_counter() - begin)
    return median(times[1:]) * 1e3


if __name__ == "__main__":
    sys.exit(main())
