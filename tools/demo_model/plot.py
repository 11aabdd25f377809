"""Draws the loss curves of a training log: `python -m tools.demo_model.plot LOG.jsonl OUT.png` (needs matplotlib)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib import pyplot

from tools.demo_model.schedule import CATEGORIES, PHASES


def draw(log: Path, out: Path) -> None:
    """One picture with two panels: the main model's nats by category, and the whole mix with MTP and indexer."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), sharex=True)
    for category in CATEGORIES:
        left.plot(steps, [line["main_by_category"].get(category) for line in lines], label=category, linewidth=1)
    for key, label in (("main", "next token"), ("mtp", "MTP block"), ("index", "indexer (KL)")):
        right.plot(steps, [line[key] for line in lines], label=label, linewidth=1)
    for axes in (left, right):
        axes.set(xlabel="step", ylabel="nats per token", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        for phase in PHASES[1:]:
            axes.axvline(phase.start * steps[-1], color="grey", linewidth=0.6, linestyle=":")
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw loss curves.", allow_abbrev=False)
    parser.add_argument("log", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    draw(args.log, args.out)


if __name__ == "__main__":
    main()
