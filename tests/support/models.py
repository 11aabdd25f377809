"""Small models for tests: configs that vary every dimension the engine depends on, random weights, greedy oracle."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4serve.config import ModelConfig, Numerics
from dsv4serve.model.transformer import Transformer
from dsv4serve.model.whole import WholeSequence
from dsv4serve.weights.dummy import dummy_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-random"

BASE: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "sliding_window": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_hash_layers": 1,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 2.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 256,
    },
    "compress_ratios": [0, 4, 128, 4, 0],
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "scoring_func": "sqrtsoftplus",
    "hidden_act": "silu",
}


def small_config(**changes: Any) -> ModelConfig:
    """The base config with fields replaced."""
    return ModelConfig.from_dict({**BASE, **changes}, "test config")


def random_config(seed: int) -> ModelConfig:
    """A small config whose shape depends on `seed`."""
    draw = random.Random(seed)
    ratios = [draw.choice([0, 4, 128]) for _ in range(draw.randint(2, 4))]
    heads = draw.choice([2, 4])
    return small_config(
        num_hidden_layers=len(ratios),
        compress_ratios=[*ratios, 0],
        num_hash_layers=draw.randint(0, 1),
        num_attention_heads=heads,
        o_groups=draw.choice([1, 2]),
        head_dim=draw.choice([16, 32]),
        sliding_window=draw.choice([5, 16, 128]),
        index_topk=draw.choice([16, 32]),
        n_routed_experts=draw.choice([3, 6]),
        num_experts_per_tok=draw.choice([1, 2]),
        hc_mult=draw.choice([2, 4]),
    )


def small_transformer(config: ModelConfig, seed: int = 0, numerics: Numerics = Numerics.EXACT) -> Transformer:
    """The network of `config` with random weights."""
    return Transformer(config, dummy_weights(config, seed), numerics)


def random_ids(config: ModelConfig, length: int, seed: int) -> list[int]:
    """Token ids without BOS and EOS."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, config.vocab_size, (length,), generator=generator).tolist()


@torch.inference_mode()
def oracle_logits(transformer: Transformer, ids: list[int]) -> Tensor:
    """Logits [len(ids), vocab] of the whole-sequence reference model."""
    return transformer.logits(transformer(torch.tensor(ids), WholeSequence(len(ids))))
