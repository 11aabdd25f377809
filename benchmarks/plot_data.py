"""What benchmarks/plot.py draws, out of lines of results: the newest of each configuration, as points of curves."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Curves = dict[str, list[tuple[float, float]]]  # by label, points in ascending order of x

VERSIONS = ("torch", "triton")  # of a line's settings: no part of what was measured
LIBRARY_FROM = 48  # tokens from which a step takes the library's products (kernels/gemm/library.py)
# Panels of kernels: title, beginnings of names.
KERNELS = (
    ("products", ("gemm", "wo_a", "out_proj")),
    ("experts, router, mHC", ("mega_moe", "route", "mhc")),
    ("attention", ("sparse_attention", "index_select")),
    ("around attention", ("compress", "prepare", "store_kv")),
    ("sampling", ("sample", "accept", "token_logprobs")),
)
IN_USE = ("triton", "triton fp8", "gluon", "gluon fp8", "library")
FASTER = ("gluon", "gluon fp8", "library")  # taken where there is one


def read(path: Path) -> list[Line]:
    """Lines of a JSONL file, none if it is missing."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def newest(lines: Iterable[Line], *results: str) -> list[Line]:
    """One line for each configuration: settings without versions, and these of the results. Of several the one with the
    latest time, of equal times the last; in the order in which configurations came first."""
    found: dict[str, Line] = {}
    for line in lines:
        settings = {name: value for name, value in line["settings"].items() if name not in VERSIONS}
        key = json.dumps([settings, [line["results"].get(name) for name in results]], sort_keys=True)
        if key not in found or line["time"] >= found[key]["time"]:
            found[key] = line
    return list(found.values())


def devices(lines: Iterable[Line]) -> str:
    """What was measured on, for a title."""
    return " and ".join(sorted({line["device"].partition(" x ")[2] or line["device"] for line in lines}))


def curves(lines: Iterable[Line], label: Callable[[Line], str], x: Callable[[Line], float | None],
           y: Callable[[Line], float | None]) -> Curves:  # fmt: skip
    """Points by label; a line without x or y, or with the label "", gives none."""
    found: Curves = defaultdict(list)
    for line in lines:
        name, place, value = label(line), x(line), y(line)
        if name and place is not None and value is not None:
            found[name].append((place, value))
    return {name: sorted(points) for name, points in found.items()}


def peer(lines: Iterable[Line], context: int) -> dict[str, tuple[Curves, list[tuple[int, float, float]]]]:
    """By model: milliseconds of a decode step by batch of both engines, and batch, ms, and how many times as fast."""
    models: dict[str, list[Line]] = defaultdict(list)
    for line in newest(lines):
        if line["settings"].get("context") == context:
            models[line["settings"]["model"]].append(line)
    found = {}
    for model, mine in models.items():
        sides = {"dsv4serve": "ms", "SGLang": "sglang_h200_ms"}
        both: Curves = {}
        for name, key in sides.items():
            both |= curves(mine, lambda _, name=name: name, _batch, lambda line, key=key: line["results"][key])
        ratios = [(_batch(line), line["results"]["ms"], line["results"]["times_as_fast"]) for line in mine]
        found[model] = both, sorted(each for each in ratios if each[2] is not None)
    return found


def _batch(line: Line) -> int:
    return line["settings"]["batch"]


def kernels(lines: Iterable[Line], model: str) -> dict[str, Curves]:
    """By panel of KERNELS: time over floor by tokens, of the implementation that a step takes at so many."""
    by_case: dict[tuple[str, int], Line] = {}
    for line in newest(lines):
        settings = line["settings"]
        op, implementation, shapes = settings["op"], settings["implementation"], settings["shapes"]
        is_model = shapes.startswith(model) or shapes == "released" or op == "compress"
        if (
            implementation not in IN_USE
            or not is_model
            or (implementation == "library") > (_tokens(line) >= LIBRARY_FROM)
        ):
            continue
        rest = shapes.removeprefix(model).strip(" -")
        case = f"{op} {'' if shapes == 'released' else rest}".strip(), _tokens(line)
        if case not in by_case or implementation in FASTER:
            by_case[case] = line
    found = {}
    for title, beginnings in KERNELS:
        mine = {case: line for case, line in by_case.items() if case[0].startswith(beginnings)}
        labels = {id(line): name for (name, _), line in mine.items()}
        found[title] = curves(mine.values(), lambda line, labels=labels: labels[id(line)], _tokens,
                              lambda line: line["results"]["times_floor"])  # fmt: skip
    return found


def _tokens(line: Line) -> int:
    return line["settings"]["num_tokens"]


def ablation(lines: Iterable[Line]) -> dict[str, dict[str, dict[str, float]]]:
    """By model and step (decode, prefill): ms without each switch; "" = as it is."""
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: {"decode": {}, "prefill": {}})
    kept = [line for line in newest(lines) if isinstance(line["settings"]["off"], list)]
    switches = {name for line in kept for name in line["settings"]["off"]}
    for line in kept:
        off, results = line["settings"]["off"], line["results"]
        name = " + ".join(off)
        if len(off) > 1:
            left = sorted(switches - set(off))
            name = "all" + (f" but {', '.join(left)}" if left else "")
        for step, key in (("decode", "decode_step_ms"), ("prefill", "prefill_ms")):
            found[line["settings"]["model"]][step][name] = results[key]
    return dict(found)


def serving(lines: Iterable[Line]) -> dict[str, Curves]:
    """By model: output tokens/s by interactivity, a curve for each pair of lengths."""
    found: dict[str, list[Line]] = defaultdict(list)
    for line in newest(lines):
        found[line["settings"]["model"]].append(line)
    return {model: curves(mine, _lengths, lambda line: line["results"]["interactivity"],
                          lambda line: line["results"]["output_tokens_per_s"])
            for model, mine in found.items()}  # fmt: skip


def _lengths(line: Line) -> str:
    return f"{line['settings']['input']} in, {line['settings']['output']} out"


def speculation(lines: Iterable[Line]) -> dict[str, Curves]:
    """By machine and model: tokens/s of all by those of one user, with and without drafts, a point a concurrency."""
    found: dict[str, Curves] = {}
    speed = newest((line for line in lines if line["settings"]["what"] == "speed"), "concurrency")
    for line in sorted(speed, key=lambda line: line["time"]):
        settings, results = line["settings"], line["results"]
        on_gpu = settings.get("device") == "cuda"
        mine = found.setdefault(f"{settings.get('model', 'demo')}, {'GPU' if on_gpu else 'CPU'}", defaultdict(list))
        for mode, rate in results["tokens_per_s"].items():
            # Settings that grew since leave a point of each concurrency only once.
            mine[mode] = [point for point in mine[mode] if point[2] != results["concurrency"]]
            mine[mode].append((results["tokens_per_s_per_user"][mode], rate, results["concurrency"]))
    return {name: {mode: sorted(point[:2] for point in points) for mode, points in modes.items()}
            for name, modes in found.items()}  # fmt: skip
