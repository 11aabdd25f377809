"""Draws the loss curves of training logs, one run after the other (needs matplotlib).

python -m tools.demo_model.plot OUT.png LOG.jsonl ..
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib import pyplot

from tools.demo_model.schedule import CATEGORIES
from tools.demo_model.train import LOG_EVERY


def draw(logs: list[Path], out: Path) -> None:
    """One picture with two panels: the main model's nats by category, and the whole mix with MTP and indexer. A
    vertical line is where a run begins or its sequences become longer."""
    lines, borders = [], []
    for log in logs:
        length = None
        for text in log.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if lines and line["length"] != length:
                borders.append(len(lines) * LOG_EVERY)
            length = line["length"]
            lines.append(line)
    steps = [(index + 1) * LOG_EVERY for index in range(len(lines))]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), sharex=True)
    for category in CATEGORIES:
        left.plot(steps, [line["main_by_category"].get(category) for line in lines], label=category, linewidth=1)
    for key, label in (("main", "next token"), ("mtp", "MTP block"), ("index", "indexer (KL)")):
        right.plot(steps, [line[key] for line in lines], label=label, linewidth=1)
    for axes in (left, right):
        axes.set(xlabel="step", ylabel="nats per token", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        for border in borders:
            axes.axvline(border, color="grey", linewidth=0.6, linestyle=":")
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw loss curves.", allow_abbrev=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("logs", type=Path, nargs="+")
    args = parser.parse_args()
    draw(args.logs, args.out)


if __name__ == "__main__":
    main()
