"""The engine that benchmarks/ablation.py takes apart computes the same, by the interpreter; and its arithmetic."""

import argparse
import copy
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.device_engine import Sequences, _planes
from support.device_models import RAW
from support.models import random_ids

from dsv4_kernels.mhc.triton import mhc_boundary
from dsv4serve.config import EngineConfig, ExpertActivations, ModelConfig, Numerics
from dsv4serve.memory import CacheLayout
from dsv4serve.model import device
from dsv4serve.model.device import DeviceTransformer
from dsv4serve.model.transformer import Transformer
from dsv4serve.weights import dummy_weights, load_weights, write_checkpoint
from dsv4serve.weights.device_loader import load_device_weights
from dsv4serve.weights.export import exported_config
from dsv4serve.weights.layout import official_view

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ablation_engine
from ablation import Ablation
from gpu_models import slice_config, whole_config
from interactivity import Side, at_equal_interactivity, day0_requests, day0_token_bytes, requests_that_fit
from unfused import SWITCHES, unfused

# Groups of the output projection that are whole blocks of scales, as the released models have.
SIZES = {**RAW, "o_lora_rank": 128}
CONFIG = ModelConfig.from_dict(exported_config(SIZES, quantized=True))


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unfused") / "model"
    write_checkpoint(folder, SIZES, functools.partial(official_view, dummy_weights(CONFIG, 3)), quantized=True)
    config = EngineConfig(model=folder)
    weights = load_weights(config, CONFIG)
    references = [Transformer(CONFIG, weights, Numerics.OFFICIAL, kind) for kind in ExpertActivations]
    device_weights = load_device_weights(config, CONFIG, torch.device("cpu"), form="bf16")
    return dict(zip(ExpertActivations, references, strict=True)), DeviceTransformer(CONFIG, device_weights)


@pytest.fixture(scope="module")
def e4m3(networks, tmp_path_factory):
    """The network with the experts that Hopper multiplies in E4M3, and these as BF16 inputs need them."""
    folder = tmp_path_factory.mktemp("e4m3") / "model"
    write_checkpoint(folder, SIZES, functools.partial(official_view, dummy_weights(CONFIG, 3)), quantized=True)
    weights = load_device_weights(EngineConfig(model=folder), CONFIG, torch.device("cpu"), form="fp8")
    return DeviceTransformer(CONFIG, weights), [(block.moe.w13, block.moe.w2) for block in networks[1].blocks]


class KeptSpares(Sequences):
    """The last row of each pool, where unfused steps put what is no entry, is put back after each of them."""

    def advance_device(self, counts, num_rows):
        pools = self.found.pools.layers
        last = [plane[-1] for layer in pools for plane in _planes(layer)]
        last += [layer.c128_state[-1] for layer in pools if layer.c128_state is not None]
        saved = [row.clone() for row in last]
        logits = super().advance_device(counts, num_rows)
        for row, before in zip(last, saved, strict=True):
            row.copy_(before)
        return logits


@pytest.mark.parametrize("off", [*((switch,) for switch in SWITCHES), SWITCHES], ids="+".join)
def test_chunks_decodes_and_padding_compute_the_same_unfused(networks, off):
    """One request crosses a C128 block, one a page, one begins; then all decode, and one closes an entry."""
    references, network = networks
    reference = references[ExpertActivations.BF16 if "bf16-experts" in off else ExpertActivations.FP8]
    sequences = KeptSpares(reference, network, ids={2: random_ids(CONFIG, 132, 2), 0: random_ids(CONFIG, 260, 3),
                                                    3: random_ids(CONFIG, 10, 4)})  # fmt: skip
    sequences.prefill({0: 254})
    sequences.prefill({2: 126})
    with unfused(off, network):
        sequences.check_step({2: 4, 0: 3, 3: 6}, num_rows=16)
        sequences.check_step({3: 1, 0: 1, 2: 1}, num_rows=4)
        sequences.check_step({3: 1, 0: 1}, num_rows=4)


@pytest.mark.parametrize("off", [("bf16-experts",), ("launches", "bf16-experts")], ids="+".join)
def test_experts_of_another_form_take_bf16_too(networks, e4m3, off):
    network, experts = e4m3
    reference = networks[0][ExpertActivations.BF16]
    sequences = KeptSpares(reference, network, ids={0: random_ids(CONFIG, 20, 3)})
    with unfused(off, network, experts):
        sequences.check_step({0: 12}, num_rows=16)
        sequences.check_step({0: 1}, num_rows=4)


def test_an_ablation_leaves_a_line_for_each_variant_and_one_that_compares(networks, tmp_path, capsys, monkeypatch):
    """One layer. Launches are counted, what rounds differently has an error, and the patches are gone."""
    monkeypatch.setattr(ablation_engine, "CHECK_STEPS", 1)
    network = copy.copy(networks[1])
    network.blocks = network.blocks[:1]
    args = argparse.Namespace(out=tmp_path / "lines.jsonl", batches=[2], context=0, prefill=3, output=256, steps=1,
                              repeats=1, switches=("mhc", "bf16-experts"))  # fmt: skip
    ablation = Ablation("tiny", network, CONFIG, args, deadline=float("inf"))
    ablation.run()
    assert ablation.agrees
    *variants, compared = [json.loads(line) for line in args.out.read_text().splitlines()]
    found = {"+".join(line["settings"]["off"]): line["results"] for line in variants}
    assert list(found) == ["", "bf16-experts", "mhc+bf16-experts", "mhc"]
    assert [line["agrees"] for line in found.values()] == [True, None, True, True]
    for step in ("decode", "prefill"):
        counts = {off: line[f"{step}_launches"] for off, line in found.items()}
        assert counts[""] == counts["bf16-experts"] < counts["mhc"] == counts["mhc+bf16-experts"]
        assert found[""][f"{step}_noise"] > 0
        assert found[""][f"{step}_error"] == 0 < found["bf16-experts"][f"{step}_error"]
    results = compared["results"]
    assert [line["off"] for line in results["switches"]] == ["bf16-experts off", "all off", "mhc off"]
    assert list(results["equal_interactivity"]) == ["all off"]
    assert results["requests_that_fit"]["off"] < results["requests_that_fit"]["on"]
    assert "all off" in capsys.readouterr().out
    assert device.mhc_boundary is mhc_boundary


def pro():
    return ModelConfig.from_dict(whole_config("pro-slice"), "pro")


def test_the_cache_of_day_0_weighs_what_its_log_says():
    assert round(day0_token_bytes(pro(), drafts=True), 2) == 23749.84


def test_as_many_requests_are_counted_as_the_plan_has_pages_for():
    budget, num_tokens = 60 * 10**9, 9 * 1024
    layout = CacheLayout.build(pro(), Numerics.OFFICIAL)
    fits = requests_that_fit(layout, budget, num_tokens)
    each = layout.slot_bytes + 36 * layout.page_bytes
    assert 0.8 * budget < fits * each < budget  # a fifth of what slots leave is for tails
    assert 2 * day0_requests(pro(), budget, num_tokens) < fits


def test_throughput_at_equal_interactivity():
    """TPOT is 20 + B + 2 B ms against 40 + 2 B + 4 B ms."""
    on = Side({10: 30.0, 20: 40.0}, prefill_ms=2048.0, num_input=8192, num_output=1024, most=100)
    off = Side({10: 60.0, 20: 80.0}, prefill_ms=4096.0, num_input=8192, num_output=1024, most=30)
    assert (on.tpot_ms(4), on.tpot_ms(15), on.tpot_ms(50)) == (32, 65, 170)
    assert on.tokens_per_s(15) == pytest.approx(15 * 9 / 0.065)
    found = at_equal_interactivity(on, off, 10)
    assert found["interactivity"] == 10.0
    assert found["batch_on"] == 26  # 98 ms; 27 would take 101
    assert found["ratio"] == pytest.approx((26 / 98) / (10 / 100), abs=1e-3)
    limited = at_equal_interactivity(on, off, 30)
    assert limited["batch_on"] == 66
    assert limited["ratio_of_speed"] == pytest.approx((30 / 110) / (30 / 220), abs=1e-3)


def test_a_slice_has_the_layers_and_experts_that_it_says():
    config = ModelConfig.from_dict(slice_config("pro-rank"), "slice")
    assert config.layer_ratios == pro().layer_ratios[3:9]
    assert sorted(config.layer_ratios) == [4] * 3 + [128] * 3
    assert (config.n_routed_experts, config.num_hash_layers) == (48, 0)
    first = ModelConfig.from_dict(slice_config("pro-slice"), "slice")
    assert first.layer_ratios == pro().layer_ratios[:4]
    assert (first.n_routed_experts, first.num_hash_layers) == (384, 3)
    assert slice_config("pro-4") == slice_config("pro-slice")
