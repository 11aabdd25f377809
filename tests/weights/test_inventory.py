"""The inventories reproduce what was published of the released checkpoints."""

import functools
import json
from collections import Counter

import pytest
import torch
from support.models import GOLDEN, small_config

from dsv4serve.config import ModelConfig
from dsv4serve.types import CheckpointError
from dsv4serve.weights import inventory, verify
from dsv4serve.weights.layout import allocate

CONFIGS = GOLDEN.parents[2] / "configs" / "models"


@functools.cache
def released(name):
    return ModelConfig.from_dict(json.loads((CONFIGS / f"{name}.json").read_text()))


@functools.cache
def released_inventory(name):
    return inventory(released(name))


@pytest.mark.parametrize(
    ("name", "num_tensors", "num_bytes"),
    [("pro", 145_116, 864_704_792_696), ("flash", 69_187, 159_609_485_896)],
)
def test_counts_and_bytes_of_the_released_checkpoints(name, num_tensors, num_bytes):
    tensors = released_inventory(name)
    assert len(tensors) == num_tensors
    assert sum(spec.num_bytes for spec in tensors.values()) == num_bytes


def test_dtypes_of_pro():
    dtypes = Counter(spec.dtype for spec in released_inventory("pro").values())
    assert dtypes == {"BF16": 619, "F32": 590, "I64": 3, "F8_E4M3": 528, "I8": 71_424, "F8_E8M0": 71_952}


@pytest.mark.parametrize(
    ("name", "prefix", "count"),
    [
        ("flash", "layers.0.", 1565),
        ("flash", "layers.2.", 1576),
        ("flash", "layers.3.", 1569),
        ("flash", "mtp.0.", 1575),
        ("pro", "layers.0.", 2337),
        ("pro", "layers.2.", 2344),
        ("pro", "layers.3.", 2337),
        ("pro", "mtp.0.", 2343),
    ],
)
def test_tensors_per_layer_kind(name, prefix, count):
    assert sum(tensor.startswith(prefix) for tensor in released_inventory(name)) == count


@pytest.mark.parametrize(
    ("tensor", "dtype", "shape"),
    [
        ("layers.2.attn.wo_a.weight", "F8_E4M3", (16384, 4096)),
        ("layers.2.attn.wo_a.scale", "F8_E8M0", (128, 32)),
        ("layers.2.attn.compressor.ape", "F32", (4, 1024)),
        ("layers.3.attn.compressor.wkv.weight", "BF16", (512, 7168)),
        ("layers.2.attn.indexer.wq_b.scale", "F8_E8M0", (64, 12)),
        ("layers.2.ffn.gate.tid2eid", "I64", (129280, 6)),
        ("layers.60.ffn.experts.383.w2.weight", "I8", (7168, 1536)),
        ("mtp.0.ffn.experts.0.w1.scale", "F8_E8M0", (3072, 224)),
        ("mtp.0.hc_attn_fn", "F32", (24, 28672)),
        ("hc_head_fn", "F32", (4, 28672)),
    ],
)
def test_shapes_of_pro(tensor, dtype, shape):
    assert released_inventory("pro")[tensor] == (dtype, shape)


def test_the_runtime_tensors_of_pro_on_the_meta_device():
    tensors = allocate(released("pro"), device="meta")
    assert tensors["layers.0.ffn.experts.w13"].shape == (384, 6144, 7168)
    assert tensors["layers.0.attn.wo_a.weight"].shape == (16, 1024, 4096)
    assert tensors["layers.0.ffn.gate.tid2eid"].dtype == torch.int64
    assert not any(name.endswith(".scale") for name in tensors)
    num_values = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
    assert round(num_values / 1e6, 1) == 1_598_837.3  # docs/model.md section 12, in millions


def test_unquantised_names_equal_the_golden_checkpoint():
    config = ModelConfig.load(GOLDEN)
    assert len(verify(GOLDEN, config).files) == len(inventory(config)) == 461


def test_a_shape_that_cannot_be_quantised_names_the_tensor():
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.wq_a\.weight would be \[32, 64\].*128"):
        inventory(small_config(quantization_config=QUANTIZATION, expert_dtype="fp4"))


QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
