"""The device layout: the same values as the CPU layout, every byte counted, wrong files refused."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.device_models import CONFIG, checkpoint

from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.mega_moe.weights import Fp4Weight, empty_experts, relayout, write_expert
from dsv4_kernels.quant import dequantize_fp8_blocks
from dsv4serve.config import EngineConfig, LoadFormat
from dsv4serve.types import CapacityError, CheckpointError
from dsv4serve.weights import load_weights
from dsv4serve.weights.device import DeviceWeights, device_bytes, require_device_memory
from dsv4serve.weights.device_loader import dummy_device_weights, load_device_weights
from dsv4serve.weights.dummy import GAINS
from dsv4serve.weights.layout import official_view

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("weights") / "model")


def num_bytes(weight):
    if isinstance(weight, torch.Tensor):
        return weight.nbytes
    return sum(getattr(weight, field.name).nbytes for field in dataclasses.fields(weight) if field.name != "form")


@pytest.mark.parametrize(("form", "has_drafts"), [("fp8", False), ("fp8", True), ("fp4", True), ("bf16", True)])
def test_every_official_tensor_is_where_its_place_says(folder, form, has_drafts):
    """Dequantised, it is what the CPU loader makes of the same file; nothing is left over."""
    config = EngineConfig(model=folder, num_draft_tokens=int(has_drafts))
    expected = load_weights(config, CONFIG)
    layout = DeviceWeights(CONFIG, CPU, form, has_drafts)
    layout.weights = load_device_weights(config, CONFIG, CPU, form)
    stored = load_file(folder / "model.safetensors")
    for name, place in layout.places.items():
        if place.expert >= 0:
            scale = stored[name.removesuffix("weight") + "scale"]
            packed = stored[name].unsqueeze(0).clone()
            own = relayout(packed, scale.view(torch.uint8).unsqueeze(0), form=form)
            rows = slice(place.first_row, place.first_row + own.num_rows)
            weight = layout.weights[place.weight]
            assert torch.equal(weight.values[place.expert, :, rows], own.values[0])
            assert torch.equal(weight.scales[place.expert, :, rows], own.scales[0])
            assert torch.equal(weight.row_scales[place.expert, rows], own.row_scales[0]) or form != "fp8"
            continue
        view, exponents = layout.view(name)
        values = view if exponents is None else dequantize_fp8_blocks(view, exponents)
        assert torch.equal(values.float(), official_view(expected, name).float()), name
    assert {place.weight for place in layout.places.values()} == set(layout.weights)
    assert bool([name for name in layout.weights if name.startswith("mtp.")]) == has_drafts


def test_products_over_one_input_are_one_matrix():
    weights = dummy_device_weights(CONFIG, 0, CPU, "fp8", has_drafts=True)
    assert weights["layers.1.attn.latent"].codes.shape == (128 + 128, 128)
    assert weights["layers.1.attn.query"].codes.shape == (4 * 128 + 16 * 128, 128)
    assert weights["layers.0.attn.query"].codes.shape == (4 * 128, 128)
    assert weights["layers.1.attn.raw"].shape == (2 * 256 + 2 * 256 + 16, 128)
    assert weights["layers.2.attn.raw"].shape == (2 * 128, 128)
    assert "layers.0.attn.raw" not in weights
    assert weights["layers.0.ffn.shared_experts.w13"].codes.shape == (2 * 128, 128)
    assert weights["mtp.0.attn.latent"].codes.shape == (128 + 128, 128)
    assert "mtp.0.attn.raw" not in weights


@pytest.mark.parametrize("has_drafts", [False, True])
def test_the_plan_counts_every_byte(has_drafts):
    weights = dummy_device_weights(CONFIG, 0, CPU, "fp8", has_drafts)
    total = sum(map(num_bytes, weights.values()))
    assert device_bytes(CONFIG, has_drafts) == total
    require_device_memory(CONFIG, has_drafts, total)
    with pytest.raises(CapacityError, match=rf"need {total:,} bytes on the device; {total - 1:,} are free"):
        require_device_memory(CONFIG, has_drafts, total - 1)


def test_dummy_weights_have_the_scale_of_their_matrix():
    """Up to the rounding of a power of two; experts use all codes."""
    weights = dummy_device_weights(CONFIG, 1, CPU, "fp4", has_drafts=True)
    layout = DeviceWeights(CONFIG, CPU, "fp4", has_drafts=True)
    layout.weights = weights
    for name, place in layout.places.items():
        weight = weights[place.weight]
        if isinstance(weight, Fp4Weight):
            assert len(weight.values.unique()) == 256
        elif isinstance(weight, Fp8Weight):
            wanted = GAINS.get(name.split(".")[-2], 1.0) / weight.codes.shape[1] ** 0.5
            found = dequantize_fp8_blocks(*layout.view(name)).std()
            assert 2**-0.6 < found / wanted < 2**0.6, name
        else:
            assert bool(torch.isfinite(weight.float()).all())
    again = dummy_device_weights(CONFIG, 1, CPU, "fp4", has_drafts=True)
    assert torch.equal(again["layers.0.ffn.experts.w2"].values, weights["layers.0.ffn.experts.w2"].values)


def test_the_checkpoint_format_decides_where_weights_come_from():
    config = EngineConfig(model="nowhere", load_format=LoadFormat.DUMMY)
    assert "layers.2.attn.latent" in load_device_weights(config, CONFIG, CPU, "fp8")


@pytest.mark.parametrize(
    ("name", "byte", "message"),
    [
        ("layers.0.attn.wq_a.weight", 0x7F, "has values that are not finite"),
        ("layers.0.attn.wq_a.scale", 255, "has a NaN scale"),
        ("layers.1.ffn.experts.2.w1.scale", 161, r"has the scale 2\^34; the GPU kernels take FP4 scales up to 2\^33"),
    ],
)
def test_damaged_values_are_refused(folder, tmp_path, name, byte, message):
    shutil.copytree(folder, tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(torch.uint8)[0, 0] = byte
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        load_device_weights(EngineConfig(model=tmp_path / "broken"), CONFIG, CPU, "bf16")


def test_groups_that_e4m3_cannot_hold_beside_their_row_are_told(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "uneven")
    path = tmp_path / "uneven" / "model.safetensors"
    tensors = load_file(path)
    scale = tensors["layers.1.ffn.experts.2.w1.scale"].view(torch.uint8)
    scale[:2, 1] = scale.max() - 12
    scale[0, 0] = scale[1, 0] = scale.max()
    save_file(tensors, path)
    config = EngineConfig(model=tmp_path / "uneven")
    load_device_weights(config, CONFIG, CPU, "fp4")
    assert not caplog.records
    load_device_weights(config, CONFIG, CPU, "fp8")
    assert [record.getMessage()[:34] for record in caplog.records] == ["2 groups of 32 expert weights are "]


def test_experts_take_matrices_of_whole_groups_only():
    with pytest.raises(ValueError, match="K is 96; expected a multiple of 128"):
        empty_experts(2, 128, 96, form="fp8", device=CPU)
    weight = empty_experts(2, 8, 128, form="fp4", device=CPU)
    packed = torch.arange(4 * 64, dtype=torch.uint8).view(4, 64)
    write_expert(weight, 1, 4, packed, torch.full((4, 4), 130, dtype=torch.uint8))
    assert torch.equal(weight.values[1, 0, 4:], packed)
