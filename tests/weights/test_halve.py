"""Weights become bfloat16 only where that changes no value and no layout."""

import torch

from dsv4serve.config import EngineConfig
from dsv4serve.weights import halve, load_weights


def test_the_matrices_of_a_checkpoint_become_bfloat16(single, model):
    weights = load_weights(EngineConfig(model=single), model)
    halved = dict(weights)
    halve(halved)
    assert halved.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(halved[name].to(tensor.dtype), tensor), name
        assert halved[name].stride() == tensor.stride(), name
    names = {name for name, tensor in halved.items() if tensor.dtype is torch.bfloat16}
    assert {"head.weight", "layers.0.attn.wo_a.weight", "layers.0.ffn.experts.w13", "mtp.0.e_proj.weight"} <= names
    assert not {"embed.weight", "norm.weight", "layers.0.ffn.gate.weight", "layers.0.hc_attn_fn"} & names


def test_a_matrix_that_would_be_rounded_stays():
    weights = {"head.weight": torch.tensor([[1.0, 1.0 + 2**-20]])}
    halve(weights)
    assert weights["head.weight"].dtype is torch.float32
