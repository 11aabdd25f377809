"""The speculation benchmark: on the device's engine, by the interpreter, one runner serves every number of drafts and
acceptance is what it was told; on CPU it leaves the lines that it says."""

import argparse
import copy
import json

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.device_models import CONFIG, both, checkpoint
from support.models import random_ids

from benchmarks import speculation
from benchmarks.forced import ForcedDeviceJudge
from dsv4serve.config import Device, EngineConfig, Numerics
from dsv4serve.memory import CacheLayout, CapacityPlan
from dsv4serve.runner import device_batch
from dsv4serve.runner.device_runner import DeviceRunner


def test_one_device_runner_serves_all_numbers_of_drafts_with_forced_acceptance(tmp_path, monkeypatch):
    """The drafts of random weights would all be rejected."""
    network = copy.copy(both(checkpoint(tmp_path / "model"), torch.device("cpu"))[1])
    network.blocks = network.blocks[:1]
    runners = []

    def build(config):
        layout = CacheLayout.build(CONFIG, Numerics.OFFICIAL, config.num_draft_tokens)
        runners.append(DeviceRunner(network, CapacityPlan(layout, 2, 4, 1, 512), config.max_step_tokens))
        return runners[-1]

    judge = ForcedDeviceJudge(torch.device("cpu"))
    monkeypatch.setattr(device_batch, "judge", judge)
    monkeypatch.setattr(speculation, "build_runner", build)
    monkeypatch.setattr(speculation, "MOST_DRAFTS", 2)
    monkeypatch.setattr(speculation, "FIRST_ROUND_STEPS", 2)
    config = EngineConfig(model=tmp_path / "model", max_running_requests=2, prefix_cache=False)
    engines = speculation.Engines(config, speculation.CLOCKS["cpu"], shares=True, has_plain=False)
    prompts = [(random_ids(CONFIG, 3, seed), 12) for seed in range(2)]
    args = argparse.Namespace(concurrency=[2], rates=[0.0, 1.0], rounds=1, steps=2)
    (result,) = speculation.forced(engines, prompts, args, 1, lambda loop, chance, seed: judge.set_chance(chance))
    assert len(runners) == 1
    assert result["none_step_ms"] > 0
    assert result["1 drafts"]["tokens_per_verify"] == {"0.0": 1.0, "1.0": 2.0}
    assert result["1 drafts"]["last_rate_over_first"] == 2.0
    assert set(result["adaptive"]["1.0"]["steps_by_drafts"]) <= {"0", "1"}


def test_acceptance_on_the_device_has_the_rate_and_never_more_drafts_than_there_are(monkeypatch):
    judge = ForcedDeviceJudge(torch.device("cpu"))
    tokens, is_bad = torch.arange(5000), torch.zeros(5000, dtype=torch.bool)
    monkeypatch.setattr(judge, "_judge", lambda *given: (None, tokens, is_bad))
    drafts = torch.randint(0, 9, (5000, 3))
    drafts[::5] = -1
    drafts[1::5, 1:] = -1
    torch.manual_seed(0)
    judge.set_chance(speculation.chance_of(0.7, 3))
    accepted, *others = judge(torch.empty(0), None, drafts)
    assert others[0] is tokens
    assert others[1] is is_bad
    assert not accepted[::5].any()
    assert set(accepted[1::5].tolist()) == {0, 1}
    assert float(accepted[2::5].float().mean()) == pytest.approx(3 * 0.7, abs=0.16)  # 4 deviations


@pytest.mark.parametrize("what", ["speed", "forced"])
def test_a_line_for_each_concurrency(tmp_path, monkeypatch, what):
    monkeypatch.setattr(speculation, "FORCED_STEPS", 3)
    monkeypatch.setattr(speculation, "FIRST_ROUND_STEPS", 3)
    monkeypatch.setattr(speculation, "REQUESTS", {1: 1, 2: 2})
    out = tmp_path / "lines.jsonl"
    speculation.main([what, "--rounds", "1", "--concurrency", "1", "2", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["results"]["concurrency"] for line in lines] == [1, 2]
    for line in lines:
        assert line["settings"]["model"] == "demo"
        assert line["settings"]["device"] == "cpu"
        assert (line["settings"]["clock"], line["settings"]["numerics"]) == ("cpu", "exact")


def test_adaptive_is_compared_with_the_number_that_is_best_in_the_middle_and_in_the_same_round():
    """Of a machine that is half as fast in the second round, and slow for one draft in the third."""
    mode = speculation.Forced(1, 0.5, is_adaptive=True)
    rounds = [[(1, 0.001), (0, 0.001)], [(1, 0.002)] * 4, [(1, 0.001), (1, 0.001), (1, 0.004)]]
    by_round = {0: [1.0, 2.0, 1.0], 1: [1.0, 2.0, 1.2]}
    assert speculation.over_best(mode, rounds, by_round) == {"drafts": 1, "median_min_max": [1.0, 0.833, 1.2]}
    assert speculation.of_adaptive(mode, rounds)["step_ms_by_drafts"] == {"0": 1.0, "1": 2.0}


def test_a_slice_has_nothing_to_say(capsys):
    with pytest.raises(SystemExit):
        speculation.main(["speed", "--model", "pro-rank", "--device", Device.CUDA.value])
    assert "random weights" in capsys.readouterr().err
