"""The device's network at Pro's shapes, for tests in which launches compute nothing."""

import json
from importlib import resources

import torch

from dsv4_kernels.mega_moe.weights import Form, Fp4Weight
from dsv4serve.config import ModelConfig
from dsv4serve.model.device import DeviceTransformer
from dsv4serve.weights.device import DeviceWeights

RATIOS = [4, 128]
NUM_EXPERTS = 384


def pro_config() -> ModelConfig:
    """Pro with two layers and few experts, whose number no launch depends on."""
    raw = json.loads((resources.files("dsv4serve_configs") / "models/pro.json").read_text("utf-8"))
    layers = {"num_hidden_layers": 2, "compress_ratios": [*RATIOS, 0], "num_hash_layers": 0}
    return ModelConfig.from_dict(raw | layers | {"n_routed_experts": 8, "vocab_size": 512})


def pro_network(form: Form = "fp8") -> DeviceTransformer:
    """With all experts, of which each is the same memory, and an MTP block; its weights are not initialised.

    `form`: of the experts, by default Hopper's.
    """
    weights = DeviceWeights(pro_config(), torch.device("cpu"), form, has_drafts=True).weights
    network = DeviceTransformer(pro_config(), weights)
    for block in [*network.blocks, network.mtp.block]:
        for name in ("w13", "w2"):
            weight = getattr(block.moe, name)
            own = weight.values, weight.scales, weight.row_scales
            same = (tensor[:1].expand(NUM_EXPERTS, *tensor.shape[1:]) for tensor in own)
            setattr(block.moe, name, Fp4Weight(*same, weight.form))
    return network
