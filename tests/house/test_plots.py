"""What the pictures of docs/performance.md are drawn from: the newest line of each configuration, and only what is in
use. Drawing itself needs matplotlib, which the project does not."""

import copy

import pytest

from benchmarks import plot_data


def line(time, settings, **results):
    return {
        "time": f"2026-11-26T00:00:{time:02}+00:00",
        "device": "1 x NVIDIA X",
        "settings": settings,
        "results": results,
    }


def kernel(time, tokens, implementation, ratio, op="gemm wo_b", shapes="pro", torch="2.11"):
    settings = {"op": op, "implementation": implementation, "shapes": shapes, "num_tokens": tokens, "torch": torch}
    return line(time, settings, times_floor=ratio)


def test_the_newest_line_counts_whatever_measured_it_and_equal_times_mean_the_last():
    lines = [kernel(5, 1, "triton", 2.0), kernel(9, 1, "triton", 1.5, torch="2.12"), kernel(7, 1, "triton", 3.0),
             kernel(9, 1, "triton", 1.4)]  # fmt: skip
    assert [one["results"]["times_floor"] for one in plot_data.newest(lines)] == [1.4]
    assert plot_data.devices(lines) == "NVIDIA X"


def test_kernels_are_those_that_a_step_takes_at_so_many_tokens():
    lines = [kernel(1, tokens, "triton", 1.0 + tokens) for tokens in (1, 16, 64)]
    lines += [kernel(1, tokens, "library", 2.0) for tokens in (16, 64)]
    lines += [kernel(1, 1, "scaled_mm per row", 9.0), kernel(1, 1, "triton", 9.0, shapes="flash")]
    lines += [kernel(1, 4, "triton", 5.0, op="sample, greedy", shapes="released")]
    lines += [kernel(1, 4, name, ratio, op="sparse_attention") for name, ratio in (("gluon", 1.5), ("triton", 2.5))]
    found = plot_data.kernels(lines, "pro")
    assert found["products"] == {"gemm wo_b": [(1, 2.0), (16, 17.0), (64, 2.0)]}
    assert found["attention"] == {"sparse_attention": [(4, 1.5)]}
    assert found["sampling"] == {"sample, greedy": [(4, 5.0)]}


def test_steps_without_a_peer_have_a_point_and_no_ratio():
    settings = {"model": "pro-8", "context": 1024, "batch": 1}
    lines = [line(1, settings, ms=2.0, sglang_h200_ms=3.0, times_as_fast=1.5),
             line(1, {**settings, "batch": 2}, ms=4.0, sglang_h200_ms=None, times_as_fast=None),
             line(1, {"model": "pro-8", "prompt": 8}, ms=4.0)]  # fmt: skip
    both, ratios = plot_data.peer(lines, 1024)["pro-8"]
    assert both == {"dsv4serve": [(1, 2.0), (2, 4.0)], "SGLang": [(1, 3.0)]}
    assert ratios == [(1, 2.0, 1.5)]


def test_an_ablation_names_what_is_off():
    settings = {"model": "m", "off": []}
    lines = [line(1, {**settings, "off": off}, decode_step_ms=ms, prefill_ms=10 * ms)
             for off, ms in (([], 1.0), (["a"], 2.0), (["a", "b"], 3.0), (["b"], 1.5), (list("abc"), 4.0))]  # fmt: skip
    lines.append(line(1, {**settings, "off": "compared"}))
    found = plot_data.ablation(lines)["m"]
    assert found["decode"] == {"": 1.0, "a": 2.0, "all but c": 3.0, "b": 1.5, "all": 4.0}
    assert found["prefill"]["b"] == 15.0


def test_drafts_have_a_point_for_each_concurrency_the_newest():
    old = {"what": "speed", "rounds": 5}
    lines = [
        line(1, old, concurrency=c, tokens_per_s={"none": 9.0 * c}, tokens_per_s_per_user={"none": 9.0}) for c in (1, 2)
    ]
    newer = copy.deepcopy(lines[0]) | {"time": "2026-11-27"}
    newer["settings"]["rounds"], newer["results"]["tokens_per_s"] = 9, {"none": 11.0}
    gpu = line(1, {**old, "model": "demo", "device": "cuda"}, **lines[0]["results"])
    forced = line(1, {"what": "forced"}, concurrency=1)
    found = plot_data.speculation([*lines, newer, gpu, forced])
    assert found == {"demo, CPU": {"none": [(9.0, 11.0), (9.0, 18.0)]}, "demo, GPU": {"none": [(9.0, 9.0)]}}


def test_serving_has_a_curve_for_each_pair_of_lengths():
    lines = [line(1, {"model": "m", "input": 8, "output": 2, "concurrency": c}, interactivity=10.0 / c,
                  output_tokens_per_s=float(c)) for c in (1, 4)]  # fmt: skip
    assert plot_data.serving(lines) == {"m": {"8 in, 2 out": [(2.5, 4.0), (10.0, 1.0)]}}


@pytest.mark.parametrize("name", ["peer", "kernels", "ablation", "speculation"])
def test_committed_results_can_be_read(root, name):
    lines = plot_data.read(root / f"benchmarks/results/{name}.jsonl")
    make = {
        "peer": lambda: plot_data.peer(lines, 1024),
        "kernels": lambda: plot_data.kernels(lines, "pro"),
        "ablation": lambda: plot_data.ablation(lines),
        "speculation": lambda: plot_data.speculation(lines),
    }
    assert all(make[name]().values())
    assert plot_data.read(root / "missing.jsonl") == []
