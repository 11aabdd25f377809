"""Step time of training on random tokens, by phase: a benchmark of the trainer, for the lab notes.

python -m tools.demo_model.speed OUT.jsonl [--no-compile]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from tools.demo_model.compiled import compile_operations
from tools.demo_model.config import model_config
from tools.demo_model.network import EXTRA_TOKENS, initial_weights
from tools.demo_model.schedule import MICRO_BATCHES, PHASES, STEP_TOKENS
from tools.demo_model.trainer import Trainer


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure training speed.", allow_abbrev=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step")
    args = parser.parse_args()
    with torch.device("cpu"):
        config = model_config()
    torch.set_default_device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = True
    if args.compile:
        compile_operations()
    with torch.device("cpu"):
        trainer = Trainer(config, initial_weights(config, 1), "cuda", captured=args.compile)
    for phase in PHASES:
        shape = (STEP_TOKENS // MICRO_BATCHES // phase.length, phase.length + EXTRA_TOKENS)
        tokens = torch.randint(0, config.vocab_size, shape)
        categories = torch.ones(shape, dtype=torch.uint8)
        times = []
        for _ in range(6):
            torch.cuda.synchronize()
            start = time.perf_counter()
            trainer.step([(tokens, categories)] * MICRO_BATCHES, phase, 1e-3)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        best = sorted(times)[1]
        line = {
            "length": phase.length,
            "select": phase.select,
            "round_weights": phase.round_weights,
            "compiled": args.compile,
            "first_s": round(times[0], 2),
            "step_ms": round(best * 1e3, 1),
            "tokens_per_s": round(STEP_TOKENS / best),
            "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
        }
        print(json.dumps(line), flush=True)
        with args.out.open("a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)
        if args.profile:
            with torch.profiler.profile() as profile:
                trainer.step([(tokens, categories)] * MICRO_BATCHES, phase, 1e-3)
                torch.cuda.synchronize()
            print(
                profile.key_averages().table(sort_by="self_device_time_total", row_limit=28, max_name_column_width=60)
            )


if __name__ == "__main__":
    main()
