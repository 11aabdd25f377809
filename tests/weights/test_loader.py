"""The loader equals a direct dequantisation written out here, and bad values are found."""

import pytest
import torch
from safetensors.torch import load_file

from dsv4serve.config import EngineConfig
from dsv4serve.types import CapacityError, CheckpointError
from dsv4serve.weights import dummy_weights, load_weights

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def load(directory, model):
    return load_weights(EngineConfig(model=directory), model, progress=False)


def powers(scale):
    return torch.exp2(scale.view(torch.uint8).double() - 127)


def fp8(stored, name):
    scale = powers(stored[f"{name}.scale"])
    rows, columns = stored[f"{name}.weight"].shape
    blocks = torch.arange(rows)[:, None] // 128, torch.arange(columns)[None, :] // 128
    return (stored[f"{name}.weight"].double() * scale[blocks]).float()


def fp4(stored, name):
    table = torch.tensor(E2M1 + [-value for value in E2M1], dtype=torch.float64)
    packed = stored[f"{name}.weight"].view(torch.uint8).long()
    values = torch.empty(packed.shape[0], packed.shape[1] * 2, dtype=torch.float64)
    values[:, 0::2], values[:, 1::2] = table[packed % 16], table[packed // 16]
    return (values * powers(stored[f"{name}.scale"]).repeat_interleave(32, dim=1)).float()


@pytest.fixture(scope="module")
def stored(single):
    return load_file(single / "model.safetensors")


@pytest.fixture(scope="module")
def loaded(single, model):
    return load(single, model)


def test_names_shapes_and_dtypes(loaded, weights):
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in loaded.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()
    }
    assert {tensor.dtype for name, tensor in loaded.items() if not name.endswith("tid2eid")} == {torch.float32}


@pytest.mark.parametrize("name", ["layers.0.attn.wq_b", "layers.1.attn.indexer.wq_b", "mtp.0.e_proj"])
def test_fp8_matrices(loaded, stored, name):
    assert torch.equal(loaded[f"{name}.weight"], fp8(stored, name))


def test_wo_a_is_split_into_groups(loaded, stored, model):
    expected = fp8(stored, "layers.2.attn.wo_a")
    for group in range(model.o_groups):
        rows = slice(group * model.o_lora_rank, (group + 1) * model.o_lora_rank)
        assert torch.equal(loaded["layers.2.attn.wo_a.weight"][group], expected[rows])


@pytest.mark.parametrize("block", ["layers.0", "mtp.0"])
def test_experts_are_stacked(loaded, stored, model, block):
    for expert in range(model.n_routed_experts):
        name = f"{block}.ffn.experts.{expert}"
        expected = torch.cat([fp4(stored, f"{name}.w1"), fp4(stored, f"{name}.w3")])
        assert torch.equal(loaded[f"{block}.ffn.experts.w13"][expert], expected)
        assert torch.equal(loaded[f"{block}.ffn.experts.w2"][expert], fp4(stored, f"{name}.w2"))
    shared = f"{block}.ffn.shared_experts"
    expected = torch.cat([fp8(stored, f"{shared}.w1"), fp8(stored, f"{shared}.w3")])
    assert torch.equal(loaded[f"{shared}.w13"], expected)
    assert torch.equal(loaded[f"{shared}.w2"], fp8(stored, f"{shared}.w2"))


def test_unquantised_values_are_unchanged(loaded, stored):
    checked = 0
    for name, tensor in stored.items():
        if tensor.dtype in (torch.bfloat16, torch.float32, torch.int64):
            assert torch.equal(loaded[name], tensor if tensor.dtype == torch.int64 else tensor.float()), name
            checked += 1
    assert checked > 50


def test_shards_load_like_one_file(loaded, sharded, model):
    again = load(sharded, model)
    assert again.keys() == loaded.keys()
    assert all(torch.equal(again[name], loaded[name]) for name in loaded)


def test_nan_scale(damage, model):
    name = "layers.1.ffn.experts.2.w3.scale"
    damage.write_values(name, b"\xff")
    with pytest.raises(CheckpointError, match=rf"{damage.shard_of(name)}: tensor '{name}' has a NaN scale"):
        load(damage.directory, model)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("layers.1.attn.wkv.weight", b"\x7f"),  # the E4M3 NaN
        ("norm.weight", b"\x80\x7f"),  # BF16 infinity
        ("hc_head_base", b"\x00\x00\xc0\x7f"),  # F32 NaN
    ],
)
def test_values_that_are_not_finite(damage, model, name, data):
    damage.write_values(name, data)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' has values that are not finite"):
        load(damage.directory, model)


@pytest.mark.parametrize("expert", [-1, 3])
def test_expert_ids_outside_the_model(damage, model, expert):
    damage.write_values("layers.0.ffn.gate.tid2eid", expert.to_bytes(8, "little", signed=True))
    with pytest.raises(CheckpointError, match=r"tid2eid' has expert ids .*; expected 0\.\.2"):
        load(damage.directory, model)


def test_a_damaged_checkpoint_is_refused_before_memory_is_asked_for(damage, model, monkeypatch):
    monkeypatch.setattr("dsv4serve.weights.loader.require_memory", lambda config: pytest.fail("asked for memory"))
    damage.shard_of("head.weight").unlink()
    with pytest.raises(CheckpointError):
        load(damage.directory, model)


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_a_model_larger_than_memory_is_refused(single, model, monkeypatch, load_format):
    monkeypatch.setattr("dsv4serve.weights.capacity.available_memory_bytes", lambda: 1_000_000)
    with pytest.raises(CapacityError, match="1,000,000 bytes of memory are available"):
        load_weights(EngineConfig(model=single, load_format=load_format), model)


def test_dummy_weights_repeat_and_depend_on_the_seed(model, weights):
    again, other = dummy_weights(model, 7), dummy_weights(model, 8)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert not any(torch.equal(other[name], weights[name]) for name in weights)
