"""The trained network: initial weights, and the loss of one batch on the project's own model code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4serve.config import ExpertActivations, ModelConfig, Numerics
from dsv4serve.model.transformer import Transformer
from dsv4serve.weights.dummy import dummy_weights
from tools.demo_model.step import TrainingStep

MTP_WEIGHT = 0.3
INDEX_WEIGHT = 1.0
EXTRA_TOKENS = 2  # a row has the targets of the last position too: one more token, and one more for the MTP block


def initial_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Runtime weights to start from: those of `dummy_weights`, with every gate near neutral."""
    weights = dummy_weights(config, seed)
    for name, weight in weights.items():
        leaf = name.rsplit(".", 1)[-1]
        if name.endswith("norm.weight"):
            weight.fill_(1)
        elif leaf in ("attn_sink", "ape", "bias"):
            weight.zero_()
        elif leaf.startswith("hc_") and leaf.endswith("_fn"):
            weight.mul_(0.2)
        elif name == "embed.weight":
            weight.mul_(0.5)
        elif name == "head.weight":
            weight.mul_(0.02)
        elif name.endswith((".wgate.weight", ".gate.weight")):
            weight.mul_(0.5)
    return weights


@dataclass(frozen=True)
class Losses:
    """Losses of one batch. `main` and `mtp` are f32 [batch, length] in nats, not yet masked; `right` bool like them:
    the main model's best guess is the token."""

    main: Tensor
    mtp: Tensor
    right: Tensor
    index: Tensor
    loads: dict[str, Tensor]


def losses(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    select: bool,
    activations: ExpertActivations = ExpertActivations.FP8,
) -> Losses:
    """Forward pass at `official` numerics, the routed experts' inputs rounded to `activations`. `tokens` int64 [batch,
    length + 2]; the loss at t predicts t + 1 (the MTP block: t + 2)."""
    batch, length = tokens.shape[0], tokens.shape[1] - EXTRA_TOKENS
    step = TrainingStep(batch, length, config.n_routed_experts, select, num_taught=max(1, batch // 4))
    model = Transformer(config, weights, Numerics.OFFICIAL, activations)
    assert model.mtp is not None
    inputs, following, targets = (tokens[:, i : i + length].flatten() for i in range(3))
    streams = model(inputs, step)
    main, right = cross_entropy(model.logits(streams), following)
    _, mtp_logits = model.mtp(streams, following, step)
    mtp, _ = cross_entropy(mtp_logits, targets)
    index = torch.stack(step.index_losses).sum()
    shaped = (values.view(batch, length) for values in (main, mtp, right))
    return Losses(*shaped, index, step.loads)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of each target, f32 [rows], and whether it has the largest logit, bool [rows]. logits f32 [rows, vocab]."""
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return nats, logits.argmax(-1) == targets


def total_loss(found: Losses, learnt: Tensor) -> Tensor:
    """The scalar to minimise. `learnt` bool [batch, length + 2]: tokens that count as targets."""
    length = found.main.shape[1]
    main = _mean(found.main, learnt[:, 1 : length + 1])
    mtp = _mean(found.mtp, learnt[:, 2 : length + 2])
    return main + MTP_WEIGHT * mtp + INDEX_WEIGHT * found.index


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp_min(1)
