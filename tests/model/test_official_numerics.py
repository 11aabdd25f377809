"""The `official` numerics: BF16 activations and every quantisation point, reference model and paged engine alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import BASE, oracle_logits, random_ids, small_config, small_transformer

from dsv4_kernels.metadata import StepMetadata
from dsv4serve.config import ExpertActivations, ModelConfig, Numerics, load_engine_config, require_official_numerics
from dsv4serve.memory import CacheLayout, CachePools
from dsv4serve.model.transformer import Transformer
from dsv4serve.model.whole import WholeSequence
from dsv4serve.runner.paged import PagedStep
from dsv4serve.types import PAGE_TOKENS, ConfigError
from dsv4serve.weights.dummy import dummy_weights

OFFICIAL = {
    **BASE,
    "hidden_size": 128,
    "head_dim": 96,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "index_head_dim": 32,
    "moe_intermediate_size": 128,
}


def test_released_models_fit_the_official_groups() -> None:
    for name in ("pro", "flash"):
        path = Path(__file__).parents[2] / "configs" / "models" / f"{name}.json"
        require_official_numerics(ModelConfig.from_dict(json.loads(path.read_text())))


def test_a_model_that_does_not_fit_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"hidden_size \(64\) to be a multiple of 128; use --numerics exact"):
        require_official_numerics(small_config())


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 60, PAGE_TOKENS])
def test_paged_step_differs_from_the_whole_sequence_by_less_than_rounding_does(chunk: int) -> None:
    """Summation order flips BF16 roundings, and a tiny random model amplifies each flip. The yardstick is what all
    roundings together do to the same model: the distance between official and exact numerics."""
    config = ModelConfig.from_dict(OFFICIAL)
    transformer = small_transformer(config, 3, Numerics.OFFICIAL)
    ids = random_ids(config, 300, 1)
    expected = oracle_logits(transformer, ids)
    exact = oracle_logits(small_transformer(config, 3), ids)
    pools = CachePools(CacheLayout.build(config, Numerics.OFFICIAL), 1, 2, 0)
    rows = []
    for first in range(0, len(ids), chunk):
        part = ids[first : first + chunk]
        metadata = StepMetadata([0], [first], [len(part)], np.array([[1, 0]]), PAGE_TOKENS)
        rows.append(transformer.logits(transformer(torch.tensor(part), PagedStep(pools, metadata))))
    found = torch.cat(rows)
    assert torch.isfinite(found).all()
    assert (found - expected).norm() < (expected - exact).norm()


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 60, PAGE_TOKENS])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_attention_layer_reads_back_what_the_simulated_rounding_gives(index: int, chunk: int) -> None:
    """One layer of each kind on the same inputs: rows through the bytes of ring and pages against rounded rows. A tie
    of BF16 index scores may fall differently by summation order, so a few rows may differ."""
    config = ModelConfig.from_dict(OFFICIAL)
    layer = small_transformer(config, 3, Numerics.OFFICIAL).blocks[index].attention
    assert layer.ratio == (0, 4, 128)[index]
    x = torch.randn(300, config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = layer(x, WholeSequence(300)).float()
    pools = CachePools(CacheLayout.build(config, Numerics.OFFICIAL), 1, 2, 0)
    rows = []
    for first, part in zip(range(0, 300, chunk), x.split(chunk), strict=True):
        metadata = StepMetadata([0], [first], [len(part)], np.array([[1, 0]]), PAGE_TOKENS)
        rows.append(layer(part, PagedStep(pools, metadata)).float())
    errors = (torch.cat(rows) - expected).norm(dim=1) / expected.norm(dim=1)
    # One BF16 step of a latent can move an E4M3 code, 2^-4 of that element; a wrong row would be an error near 1.
    assert errors.median() < 2**-6
    assert errors.max() < 2**-4


@torch.inference_mode()
def test_quantisation_points_change_the_result_and_only_slightly() -> None:
    config = ModelConfig.from_dict(OFFICIAL)
    ids = random_ids(config, 200, 2)
    exact = oracle_logits(small_transformer(config, 3), ids)
    official = oracle_logits(small_transformer(config, 3, Numerics.OFFICIAL), ids)
    difference = ((official - exact).norm() / exact.norm()).item()
    assert 0.01 < difference < 0.6


@torch.inference_mode()
def test_expert_activations_round_the_routed_experts_alone() -> None:
    config = ModelConfig.from_dict(OFFICIAL)
    weights, ids = dummy_weights(config, 3), random_ids(config, 40, 2)
    logits = {}
    for path in ExpertActivations:
        transformer = Transformer(config, weights, Numerics.OFFICIAL, path)
        assert all(layer.moe.activations == path for layer in [*transformer.blocks, transformer.mtp.block])
        logits[path] = oracle_logits(transformer, ids)
    released = Transformer(config, weights, Numerics.OFFICIAL)
    assert torch.equal(oracle_logits(released, ids), logits[ExpertActivations.FP8])
    assert not torch.equal(logits[ExpertActivations.BF16], logits[ExpertActivations.FP8])
    assert not torch.equal(logits[ExpertActivations.FP4], logits[ExpertActivations.FP8])


def test_exact_numerics_take_no_expert_activations() -> None:
    with pytest.raises(ConfigError, match=r"expert_activations: .*only for --numerics official.*'fp4'"):
        load_engine_config({"numerics": "exact", "expert_activations": "fp4"})
    config = load_engine_config({"numerics": "exact", "expert_activations": "fp8"})  # the default, as given to children
    assert (
        Transformer(small_config(), dummy_weights(small_config(), 0), config.numerics).blocks[0].moe.activations
        == "bf16"
    )
