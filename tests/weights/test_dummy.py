"""Dummy weights have the right scale: activations neither vanish nor explode, logits are flat enough to babble."""

import pytest
import torch
from support.models import oracle_logits, random_ids, small_config

from dsv4serve.config import Numerics
from dsv4serve.model.transformer import Transformer
from dsv4serve.weights import dummy_weights


@pytest.mark.parametrize("hidden", [64, 256])
def test_logits_have_the_same_spread_at_any_width(hidden):
    config = small_config(hidden_size=hidden, vocab_size=512)
    logits = oracle_logits(Transformer(config, dummy_weights(config, 3), Numerics.EXACT), random_ids(config, 48, 3))
    assert 1.0 < float(logits.std()) < 2.6
    assert bool(torch.isfinite(logits).all())


def test_every_value_is_drawn():
    config = small_config()
    for name, tensor in dummy_weights(config, 5).items():
        if tensor.is_floating_point():
            assert bool(torch.isfinite(tensor).all()), name
            assert float(tensor.abs().max()) < 10, name
            assert tensor.numel() == 1 or tensor.unique().numel() > tensor.numel() // 400, name


def test_hash_experts_of_a_token_are_distinct():
    config = small_config(num_hash_layers=2, n_routed_experts=6, num_experts_per_tok=3)
    ids = dummy_weights(config, 1)["layers.1.ffn.gate.tid2eid"]
    assert ids.shape == (config.vocab_size, 3)
    assert int(ids.min()) == 0
    assert int(ids.max()) == 5
    assert all(len(set(row)) == 3 for row in ids.tolist())
