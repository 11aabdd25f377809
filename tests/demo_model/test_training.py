"""The trainer computes the model that serves: blockwise step, gradient forms, rounding, schedule."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.models import random_ids, small_config, small_transformer

from dsv4_kernels.mega_moe import reference
from dsv4_kernels.mhc.reference import sinkhorn
from dsv4_kernels.out_proj import reference as out_proj_reference
from dsv4_kernels.quant import (
    dequantize_fp4_weight,
    dequantize_fp8_blocks,
    fake_quantize_fp4,
    quantize_fp4_weight,
    quantize_fp8_blocks,
)
from dsv4_kernels.rope import apply_rope, rope_table
from dsv4serve.config import EngineConfig, ModelConfig, default_model
from dsv4serve.model.whole import WholeSequence
from dsv4serve.weights.loader import load_weights
from tools.demo_model import __main__ as command
from tools.demo_model import operations, trainer
from tools.demo_model.config import model_config
from tools.demo_model.muon import orthogonalize
from tools.demo_model.network import initial_weights, losses, total_loss
from tools.demo_model.rounding import rounded, stored_dtypes
from tools.demo_model.schedule import DECAY, PHASES, RATE, phase_at, rate_at
from tools.demo_model.step import TrainingStep
from tools.demo_model.train import read_weights, train


@torch.no_grad()
@pytest.mark.parametrize("select", [True, False])
def test_training_step_computes_the_whole_sequence_model(select):
    config = small_config()
    transformer = small_transformer(config, 3)
    length = 8 * config.sliding_window
    batch = [random_ids(config, length, seed) for seed in (1, 2)]
    step = TrainingStep(2, length, config.n_routed_experts, select, num_taught=1)
    found = transformer(torch.tensor(batch).flatten(), step).unflatten(0, (2, length))
    for ids, streams in zip(batch, found, strict=True):
        whole = WholeSequence(length)
        if not select:
            whole.must_select = lambda top_k: False
        torch.testing.assert_close(streams, transformer(torch.tensor(ids), whole), atol=2e-5, rtol=1e-5)
    assert all(torch.isfinite(loss) and loss > 0 for loss in step.index_losses)
    assert {int(load.sum()) for load in step.loads.values()} == {2 * length * config.num_experts_per_tok}


def test_gradient_forms_compute_the_same_values():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 4, generator=draw)
    torch.testing.assert_close(sinkhorn(logits.clone().requires_grad_(), 20, 1e-6).detach(), sinkhorn(logits, 20, 1e-6))
    rotations = rope_table(torch.arange(5), torch.rand(8, dtype=torch.float64, generator=draw))
    x = torch.randn(5, 3, 20, generator=draw)
    for inverse in (False, True):
        with_gradient = apply_rope(x.clone().requires_grad_(), rotations, inverse).detach()
        torch.testing.assert_close(with_gradient, apply_rope(x, rotations, inverse))


def test_rounded_weights_are_those_a_checkpoint_holds_and_pass_gradients():
    config = model_config()
    weights = initial_weights(config, 1)
    name = "layers.0.ffn.experts.w2"
    weights[name].requires_grad_()
    found = rounded(weights, stored_dtypes(config, weights))
    expected = dequantize_fp4_weight(*quantize_fp4_weight(weights[name].detach()))
    torch.testing.assert_close(found[name].detach(), expected, rtol=1e-6, atol=0)
    dense = weights["layers.0.attn.wq_a.weight"]
    torch.testing.assert_close(
        found["layers.0.attn.wq_a.weight"], dequantize_fp8_blocks(*quantize_fp8_blocks(dense)), rtol=1e-6, atol=0
    )
    assert torch.equal(found["embed.weight"], weights["embed.weight"].bfloat16().float())
    found[name].sum().backward()
    assert torch.equal(weights[name].grad, torch.ones_like(weights[name]))


def test_orthogonalize_brings_singular_values_near_one():
    updates = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for matrices in (updates, updates.transpose(1, 2)):
        values = torch.linalg.svdvals(orthogonalize(matrices))
        assert 0.5 < values.min() < values.max() < 1.4


def test_schedule_covers_every_step():
    assert [phase_at(step, 1000) for step in (0, 399, 400, 999)] == [PHASES[0], PHASES[0], PHASES[1], PHASES[-1]]
    rates = [rate_at(step, 1000) for step in range(1000)]
    assert rates[0] < rates[149] == RATE == rates[int(1000 * DECAY)]
    assert 0 < rates[-1] < RATE / 100
    assert rate_at(600, 1000, first=600) < RATE / 100 < rate_at(749, 1000, first=600) == rates[749]


def test_parts_of_a_step_round_the_experts_inputs_in_turn_on_one_rank_and_on_two(monkeypatch):
    seen = []

    def recorded(*args):
        seen.append(args[-1])
        return losses(*args)

    monkeypatch.setattr(trainer, "losses", recorded)
    config = model_config()
    draw = torch.Generator().manual_seed(0)
    parts = [(torch.randint(0, 4096, (1, 258), generator=draw), torch.ones(1, 258, dtype=torch.uint8)) for _ in "ab"]
    for first_part, mine in ((0, parts), (0, parts[:1]), (1, parts[:1])):
        trainer.Trainer(config, initial_weights(config, 1), "cpu", first_part).step(mine, PHASES[-1], 1e-3)
    assert seen == ["fp8", "fp4", "fp8", "fp4"]


def test_fp4_inputs_are_another_loss_with_gradients():
    config = model_config()
    weights = initial_weights(config, 1)
    name = "layers.0.ffn.experts.w13"
    weights[name].requires_grad_()
    tokens = torch.randint(0, 4096, (1, 258), generator=torch.Generator().manual_seed(0))
    fp8, fp4 = (losses(config, weights, tokens, True, kind) for kind in PHASES[-1].activations)
    assert not torch.equal(fp8.main, fp4.main)
    total_loss(fp4, torch.ones(1, 258, dtype=torch.bool)).backward()
    assert weights[name].grad.abs().sum() > 0


@pytest.mark.parametrize("activations", ["fp8", "fp4"])
def test_grouped_experts_are_those_of_the_reference(activations):
    draw = torch.Generator().manual_seed(0)
    width, hidden, num_tokens = 128, 128, 50
    shapes = [(4, 2 * width, hidden), (4, hidden, width), (2 * width, hidden), (hidden, width)]
    matrices = [fake_quantize_fp4(torch.randn(*shape, generator=draw) * 0.1) for shape in shapes]
    values = [torch.randn(num_tokens, hidden, generator=draw).bfloat16(), torch.rand(num_tokens, 2, generator=draw)]
    ids = torch.rand(num_tokens, 4, generator=draw).argsort(1)[:, :2]
    ids[ids == 3] = ids.flip(1)[ids == 3]  # nobody chooses the last expert
    results = []
    for operation in (operations.mega_moe, reference.mega_moe):
        x, weights, *leaves = (value.clone().requires_grad_() for value in (*values, *matrices))
        output = operation(x, ids, weights, *leaves, limit=10.0, activations=activations, quantize_shared=True)
        (output.float() * torch.linspace(-1, 1, hidden)).sum().backward()
        results.append([output, *(leaf.grad for leaf in (x, weights, *leaves))])
    assert torch.equal(results[0][0], results[1][0])
    for found, expected in zip(*results, strict=True):
        assert (found.float() - expected.float()).norm() <= 5e-3 * expected.float().norm()


@pytest.mark.parametrize("quantize", [True, False])
def test_products_in_bfloat16_are_those_of_the_reference(quantize):
    draw = torch.Generator().manual_seed(0)
    o = torch.randn(20, 8, 64, generator=draw).bfloat16()
    wo_a, wo_b = (fake_quantize_fp4(torch.randn(*shape, generator=draw)) for shape in ((2, 64, 256), (96, 128)))
    found, expected = (
        module.grouped_out_proj(o, wo_a, wo_b, quantize=quantize) for module in (operations, out_proj_reference)
    )
    assert (found.float() - expected.float()).norm() <= 5e-3 * expected.float().norm()


class RandomBatches:
    """Random tokens in place of the builders' text."""

    def next(self):
        draw = np.random.default_rng(0)
        return draw.integers(0, 4096, (1, 258)).astype(np.uint16), np.ones((1, 258), dtype=np.uint8)


def test_a_run_leaves_checkpoints_that_hold_its_weights(tmp_path):
    out = tmp_path / "run"
    tokenizer = default_model()
    train(out, RandomBatches(), range(2), initial_weights(model_config(), 1), tokenizer, device="cpu", compiled=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert json.loads((out / "official" / name).read_text()) == json.loads((tokenizer / name).read_text())
    trained = load_file(out / "weights.safetensors")
    config = model_config()
    assert not torch.equal(trained["embed.weight"], initial_weights(config, 1)["embed.weight"])
    dtypes = stored_dtypes(config, trained)
    expected = rounded(trained, dtypes)
    for folder, values in (("official", expected), ("master", trained)):
        model = ModelConfig.load(out / folder)
        for name, weight in load_weights(EngineConfig(model=out / folder), model).items():
            value = values[name].bfloat16().float() if dtypes[name] != "F32" else values[name]
            torch.testing.assert_close(weight.to(value.dtype), value, rtol=1e-6, atol=0)
    start = read_weights(out / "master")
    assert start.keys() == trained.keys()
    assert all(torch.equal(start[name], trained[name].bfloat16().float()) for name in start if dtypes[name] != "F32")


def test_one_command_makes_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "DATA", tmp_path)
    monkeypatch.setattr(command, "TOKENIZER", tmp_path / "tokenizer")
    out = tmp_path / "run"

    def modules():
        return [module for module, *_ in command.steps(out)]

    assert modules() == ["fetch", "extract_facts", "builders.natural", "tokenizer", "train"]
    for name in ("facts.json", "natural.jsonl.xz"):
        (tmp_path / name).touch()
    assert modules() == ["tokenizer", "train"]
    (tmp_path / "tokenizer").mkdir()
    assert command.steps(out) == [["train", str(out), "--tokenizer", str(tmp_path / "tokenizer")]]
    (out / "master").mkdir(parents=True)
    assert not command.steps(out)
