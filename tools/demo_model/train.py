"""Trains the demo model on one GPU or two and writes the official checkpoint and its BF16 master.

    python -m tools.demo_model.train OUT --tokenizer DIR

With `torchrun --nproc-per-node 2` in place of `python` two GPUs share every step. The same command and seed see the
same data in the same order on one or two; GPU sums are not bit-reproducible. Progress goes to OUT/log.jsonl, one line
every LOG_EVERY steps. `--weights CHECKPOINT --at 0.6` trains on from another run's master, with the last 40 % of the
schedule. Facts and choices: docs/demo-model.md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from dsv4serve.config import EngineConfig, ModelConfig
from dsv4serve.weights.loader import load_weights
from tools.demo_model.compiled import compile_operations
from tools.demo_model.config import model_config
from tools.demo_model.data import Batches
from tools.demo_model.export import export, save
from tools.demo_model.network import initial_weights
from tools.demo_model.schedule import CATEGORIES, MICRO_BATCHES, STEP_TOKENS, phase_at, rate_at
from tools.demo_model.trainer import Trainer

LOG_EVERY = 50
SAVE_EVERY = 500  # steps; nothing that comes after training may lose it


class Log:
    """Averages of LOG_EVERY steps as JSON lines."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._sums: list[dict[str, Tensor]] = []
        self._start = self._last = time.monotonic()

    def add(self, step: int, sums: dict[str, Tensor], tokens: int, **facts: Any) -> None:
        """Collect; the device is only waited for when a line is written."""
        self._sums.append(sums)
        if len(self._sums) < LOG_EVERY:
            return
        total = {key: sum(item[key].double() for item in self._sums).cpu() for key in sums}
        now = time.monotonic()
        line: dict[str, Any] = {"step": step, "elapsed_s": round(now - self._start, 1), **facts}
        line["tokens_per_s"] = round(tokens * LOG_EVERY / (now - self._last))
        for name in ("main", "mtp", "right"):
            values, count = total[name], total[f"{name}_tokens"]
            line[name] = round(float(values[1:].sum() / count[1:].sum()), 4)
            line[f"{name}_by_category"] = {
                category: round(float(values[i] / count[i]), 4)
                for i, category in enumerate(CATEGORIES, start=1)
                if count[i]
            }
        line |= {key: round(float(total[key]) / LOG_EVERY, 4) for key in ("index", "norm", "imbalance")}
        print(json.dumps(line), file=self._file, flush=True)
        print(json.dumps({key: value for key, value in line.items() if "category" not in key}), flush=True)
        self._sums, self._last = [], now


def rank_of() -> tuple[int, int]:
    """This process's rank and how many there are, from torchrun's environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Runtime weights in float32 of a checkpoint folder."""
    weights = load_weights(EngineConfig(model=checkpoint), ModelConfig.load(checkpoint))
    return {name: weight.float() if weight.is_floating_point() else weight for name, weight in weights.items()}


def train(
    out: Path,
    batches: Batches,
    steps: range,
    weights: dict[str, Tensor],
    tokenizer: Path,
    device: str,
    compiled: bool,
) -> None:
    """Run the phases of `steps`, which end the schedule, from `weights` (runtime tensors), and export."""
    rank, ranks = rank_of()
    torch.set_default_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    if compiled:
        compile_operations()
    with torch.device("cpu"):
        first_part = rank * (MICRO_BATCHES // ranks)
        trainer = Trainer(model_config(), weights, device, first_part, captured=compiled and device == "cuda")
    if rank == 0:
        out.mkdir(parents=True)
        log = Log(out / "log.jsonl")
    for step in steps:
        phase, rate = phase_at(step, steps.stop), rate_at(step, steps.stop, steps.start)
        arrays = [batches.next() for _ in range(MICRO_BATCHES // ranks)]
        parts = [(torch.from_numpy(a).to(device).long(), torch.from_numpy(b).to(device)) for a, b in arrays]
        sums = trainer.step(parts, phase, rate)
        if rank > 0:
            continue
        log.add(step + 1, sums, STEP_TOKENS, rate=round(rate, 6), length=phase.length)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps.stop:
            save(trainer.weights, out / "weights.safetensors")
    torch.set_default_device(None)
    if rank == 0:
        export(out / "weights.safetensors", out, tokenizer)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="new folder for log and checkpoints")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--steps", type=int, default=2900, help=f"updates of {STEP_TOKENS} tokens each")
    parser.add_argument("--weights", type=Path, help="checkpoint to train on from (default: random weights)")
    parser.add_argument("--at", type=float, default=0.0, help="share of the schedule to begin at (default: 0)")
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--workers", type=int, default=14, help="processes of each rank that make data")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists; give a new folder, or remove this one")
    steps = range(int(args.at * args.steps), args.steps)
    weights = read_weights(args.weights) if args.weights else initial_weights(model_config(), args.seed)
    rank, ranks = rank_of()
    if ranks > 1:
        torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.device == "cuda":
            torch.cuda.set_device(rank)
    batches = Batches(args.tokenizer, args.seed, args.workers, steps, rank, ranks)
    try:
        train(args.out, batches, steps, weights, args.tokenizer, args.device, args.compile)
    finally:
        batches.close()
        if ranks > 1:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
