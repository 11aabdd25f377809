"""What device 'cuda' refuses, in words for people, and how it divides the memory."""

import dataclasses
import json

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.device_models import CONFIG, RAW

from dsv4serve.cli.main import main
from dsv4serve.config import Device, EngineConfig, ExpertActivations, LoadFormat, Numerics
from dsv4serve.memory.activations import row_bytes
from dsv4serve.runner import build_runner
from dsv4serve.runner.device_build import device_plan, require_kernels, reserved_bytes
from dsv4serve.types import CapacityError, ConfigError, KernelUnavailable
from dsv4serve.weights.device import device_bytes
from dsv4serve.weights.export import exported_config


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(exported_config(RAW, quantized=True)))
    return tmp_path


def config(folder, **settings):
    return EngineConfig(model=folder, load_format=LoadFormat.DUMMY, device=Device.CUDA, **settings)


def test_a_machine_without_a_gpu_says_so(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device is 'cuda', but torch .* finds no CUDA device .*; use --device cpu"):
        build_runner(config(folder))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"numerics": Numerics.EXACT}, "numerics 'exact'"),
        ({"check_numerics": True}, "check_numerics"),
        ({"shadow_steps": 9}, "shadow_steps 9"),
        ({"expert_activations": ExpertActivations.FP4}, "expert_activations 'fp4'"),
    ],
)
def test_settings_of_the_cpu_engine_alone_are_refused(folder, settings, found):
    with pytest.raises(ConfigError, match=f"{found} works on CPU only: .*; change it or use --device cpu"):
        build_runner(config(folder, **settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 192}, "head_dim is 192; the GPU kernels take 128, 256 and 512"),
        ({"qk_rope_head_dim": 32}, "qk_rope_head_dim is 32; the GPU kernels take 64"),
        ({"hc_mult": 2}, "hc_mult is 2; the GPU kernels take 4"),
        ({"index_topk": 8192}, "index_topk is 8192; the GPU kernels take at most 2048"),
        ({"expert_dtype": None}, "expert_dtype is None; the GPU kernels take 'fp4'"),
        ({"weight_block_size": None}, "quantization_config is None; the GPU kernels take FP8 weights in blocks"),
    ],
)
def test_sizes_that_no_kernel_takes_are_named(changes, message):
    require_kernels(CONFIG)
    with pytest.raises(KernelUnavailable, match=message):
        require_kernels(dataclasses.replace(CONFIG, **changes))


def test_the_cache_gets_a_share_of_what_weights_and_steps_leave(folder):
    used = reserved_bytes(config(folder), CONFIG) + device_bytes(CONFIG, has_drafts=False)
    free = used + (12 << 20)
    plan = device_plan(config(folder, memory_fraction=0.5), CONFIG, free)
    assert plan.total_bytes <= 6 << 20
    assert plan.total_bytes >= 5 << 20
    with pytest.raises(CapacityError, match=r"the weights need [\d,]+ bytes on the device; [\d,]+ are free"):
        device_plan(config(folder), CONFIG, used - 1)
    with pytest.raises(CapacityError, match=r"cache_bytes is 12,582,913; .* leave 12,582,912 on the device"):
        device_plan(config(folder, cache_bytes=(12 << 20) + 1), CONFIG, free)


def test_drafts_of_a_model_without_an_mtp_block_are_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"num_nextn_predict_layers": 0, "compress_ratios": raw["compress_ratios"][:-1]}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"num_draft_tokens is 2, but .* has no MTP block .*; use 0"):
        build_runner(config(folder, num_draft_tokens=2))


def test_drafts_take_an_mtp_block_and_logits_of_more_rows(folder):
    plain, drafting = (config(folder, num_draft_tokens=num, max_running_requests=4) for num in (0, 3))
    assert reserved_bytes(drafting, CONFIG) - reserved_bytes(plain, CONFIG) == 2 * 4 * 6 * CONFIG.vocab_size * 4
    block = device_bytes(CONFIG, has_drafts=True) - device_bytes(CONFIG, has_drafts=False)
    used = reserved_bytes(drafting, CONFIG) + device_bytes(CONFIG, has_drafts=False)
    with pytest.raises(CapacityError, match=r"the weights need [\d,]+ bytes on the device; [\d,]+ are free"):
        device_plan(drafting, CONFIG, used + block - 1)
    assert device_plan(drafting, CONFIG, used + block + (64 << 20)).layout.num_draft_tokens == 3


def test_larger_steps_leave_less_to_the_cache(folder):
    sizes = [reserved_bytes(config(folder, max_step_tokens=tokens), CONFIG) for tokens in (1024, 8192)]
    assert sizes[1] - sizes[0] == 7168 * row_bytes(CONFIG)


def test_check_prints_what_would_run_each_operation(folder, capsys):
    """The table comes before the plan, which needs a GPU."""
    main(["check", "--device", "cuda", "--model", str(folder), "--load-format", "dummy"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[1]: " ".join(line.split()[3:-1]) for line in lines if line.startswith("│") and "│" in line[1:]}
    assert rows["mega_moe"] == rows["sparse_attention"] == rows["sampling"] == rows["metadata"] == "Triton"
