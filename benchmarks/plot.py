"""Draws the measured results into pictures for docs/performance.md (needs matplotlib, which the project does not).

    python3 -m venv /tmp/mpl && /tmp/mpl/bin/pip install matplotlib
    PYTHONPATH=/tmp/mpl/lib/python3.11/site-packages .venv/bin/python -m benchmarks.plot docs/images

Where a configuration was measured more than once the newest line counts (benchmarks/plot_data.py). What has no results
yet is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.ticker import ScalarFormatter
from PIL import Image

from benchmarks import plot_data
from benchmarks.plot_data import Curves

RESULTS = Path(__file__).parent / "results"
OURS, OTHERS = "#0b6bcb", "#c2410c"
CONTEXT = 1024  # of the decode steps beside SGLang's: the context that has most of them
MAX_BYTES = 60_000


def panels(number: int, title: str, width: float = 4.4, height: float = 3.6) -> tuple[Any, list[Any]]:
    """A figure on white, so that it can be read on dark pages as well, and its panels in a row."""
    figure, axes = pyplot.subplots(1, number, figsize=(width * number, height), squeeze=False, facecolor="white")
    figure.suptitle(title, fontsize=11)
    return figure, list(axes[0])


def draw(axes: Any, found: Curves, style: str = "o-", **settings: Any) -> None:
    """Curves with a legend."""
    for name, points in found.items():
        axes.plot(*zip(*points, strict=True), style, label=name, markersize=3.5, linewidth=1.3, **settings)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def plain(axis: Any, ticks: list[int] | None = None) -> None:
    """Numbers as they are, not as powers."""
    if ticks:
        axis.set_ticks(ticks, labels=[f"{tick:,}" for tick in ticks], minor=False)
    else:
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(ScalarFormatter())
        axis.set_tick_params(which="both", labelsize=7)


def ticks_within(limits: tuple[float, float]) -> list[int]:
    """1, 2, 5, 10, 20, .. as far as the axis goes."""
    every = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]
    return [tick for tick in every if limits[0] <= tick <= limits[1]]


def peer() -> Any:
    """Step time against SGLang."""
    lines = plot_data.read(RESULTS / "peer.jsonl")
    found = plot_data.peer(lines, CONTEXT)
    if not found:
        return None
    figure, axes = panels(
        len(found),
        f"decode steps of slices at {CONTEXT:,} tokens, one {plot_data.devices(lines)}, against SGLang's on an H200",
    )
    for panel, (model, (both, ratios)) in zip(axes, found.items(), strict=True):
        for (name, points), color in zip(both.items(), (OURS, OTHERS), strict=False):
            rates = [(batch, 1000 * batch / ms) for batch, ms in points]
            draw(panel, {name: rates}, color=color)
        for batch, ms, times in ratios:
            panel.annotate(f"{times:.2f}x", (batch, 1000 * batch / ms), (-4, 5), textcoords="offset points",
                           fontsize=7, ha="right", color=OURS)  # fmt: skip
        panel.set(xscale="log", yscale="log", title=model, xlabel="requests", ylabel="tokens/s (requests / step time)")
        panel.margins(0.1, 0.12)
        plain(panel.xaxis, [int(batch) for batch, _ in both["dsv4serve"]])
        plain(panel.yaxis, ticks_within(panel.get_ylim()))
        panel.minorticks_off()
        panel.legend(fontsize=8, loc="lower right")
    return figure


def kernels() -> Any:
    """Time over floor."""
    lines = plot_data.read(RESULTS / "kernels.jsonl")
    found = plot_data.kernels(lines, "pro")
    if not any(found.values()):
        return None
    on = plot_data.devices(plot_data.newest(lines))
    figure, axes = panels(len(found), f"kernels at Pro's shapes, {on}: time over the floor of bytes or FLOPs", 3.7, 5.0)
    for panel, (title, mine) in zip(axes, found.items(), strict=True):
        panel.set_prop_cycle(color=[pyplot.get_cmap("tab20")(index) for index in range(20)])
        draw(panel, mine)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(xscale="log", yscale="log", title=title, xlabel="tokens")
        plain(panel.xaxis, [1, 16, 256, 8192] if title != "sampling" else [1, 16, 64, 256])
        plain(panel.yaxis, ticks_within(panel.get_ylim()))
        panel.minorticks_off()
        panel.legend(fontsize=6, loc="upper left" if title == "products" else "upper right")
    axes[0].set_ylabel("times the floor")
    return figure


def ablation() -> Any:
    """What each fusion is worth."""
    lines = plot_data.read(RESULTS / "ablation.jsonl")
    found = plot_data.ablation(lines)
    if not found:
        return None
    on = plot_data.devices(plot_data.newest(lines))
    pairs = [(model, step, ms) for model, steps in found.items() for step, ms in steps.items()]
    figure, axes = panels(len(pairs), f"what is off, and how many times as long a step takes then, {on}", 5.2, 3.4)
    for panel, (model, step, ms) in zip(axes, pairs, strict=True):
        ratios = sorted((value / ms[""], name) for name, value in ms.items() if name)
        bars = panel.barh([name for _, name in ratios], [max(ratio - 1, 0) for ratio, _ in ratios], left=1, color=OURS)
        panel.bar_label(bars, [f"{ratio:.2f}" for ratio, _ in ratios], fontsize=7, padding=2)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set(xscale="log", title=f"{model}: {step} (as it is {ms['']:.1f} ms)", xlim=(0.9, 1.4 * ratios[-1][0]))
        plain(panel.xaxis, ticks_within(panel.get_xlim()))
        panel.minorticks_off()
        panel.tick_params(labelsize=7)
    return figure


def frontier(by_panel: dict[str, Curves], title: str) -> Any:
    """Throughput against interactivity."""
    if not by_panel:
        return None
    figure, axes = panels(len(by_panel), title)
    for panel, (name, mine) in zip(axes, by_panel.items(), strict=True):
        draw(panel, mine)
        panel.set(title=name, xlabel="interactivity, tokens/s of one user", ylabel="tokens/s of all", yscale="log")
        plain(panel.yaxis)
        panel.set_xlim(left=0)
    return figure


def serving() -> Any:
    """A closed loop without drafts."""
    return frontier(plot_data.serving(plot_data.read(RESULTS / "serving.jsonl")), "throughput against interactivity")


def speculation() -> Any:
    """With and without drafts."""
    found = plot_data.speculation(plot_data.read(RESULTS / "speculation.jsonl"))
    return frontier(found, "greedy answers with and without drafts")


PICTURES: dict[str, Callable[[], Any]] = {
    "peer": peer, "kernels": kernels, "ablation": ablation, "serving": serving, "speculation": speculation
}  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the PNG files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        figure = make()
        if figure is None:
            print(f"{name}: no results yet")
            continue
        path = args.out / f"performance-{name}.png"
        figure.tight_layout()
        drawn = BytesIO()
        figure.savefig(drawn, dpi=90)
        # Lines and letters do not miss the other colours, and the file is a third.
        Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size > MAX_BYTES:
            raise SystemExit(f"{path}: {path.stat().st_size} bytes; at most {MAX_BYTES}")
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
