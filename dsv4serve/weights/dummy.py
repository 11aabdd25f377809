"""Random weights of the right scale for any config.json (`--load-format dummy`); needs no weight files."""

from __future__ import annotations

import math

import torch

from dsv4serve.config import ModelConfig
from dsv4serve.weights.capacity import require_memory
from dsv4serve.weights.layout import allocate, official_view, value_specs

# Standard deviation of a matrix is gain / sqrt(columns), so that every product keeps the scale of its input.
# Routing and pooling gates are sharper than 1 so that discrete choices differ between tokens; what is added to
# the streams is weaker than 1 so that depth does not drown the token itself.
GAINS = {"gate": 1.5, "wgate": 1.5, "w1": 1.3, "w3": 1.3, "w2": 0.4, "wo_b": 0.4, "head": 2.0}


def dummy_weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Runtime weights (see `layout`) drawn from `seed`; the same seed gives the same bits.

    Logits come out with a standard deviation of about 2. Values that a checkpoint stores as BF16 are BF16 numbers.
    Raises CapacityError when the float32 model does not fit in the memory that is available.
    """
    require_memory(config)
    generator = torch.Generator().manual_seed(seed)
    weights = allocate(config)
    for name, spec in value_specs(config):
        view = official_view(weights, name)
        if name.endswith(".tid2eid"):
            fill_distinct(view, config.n_routed_experts, generator)
            continue
        fill(view, name, config, generator)
        if spec.dtype == "BF16":
            view.copy_(view.bfloat16())
    return weights


def fill(view: torch.Tensor, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    """Random values for the official tensor `name` into `view`, of its shape and on the generator's device."""
    parts = name.split(".")
    leaf = parts[-1]
    if leaf == "weight" and view.ndim == 2:
        gain = math.sqrt(view.shape[1]) if parts[0] == "embed" else GAINS.get(parts[-2], 1.0)
        view.normal_(0, gain / math.sqrt(view.shape[1]), generator=generator)
    elif leaf == "weight":  # norms; keys are louder, so that attention is not flat
        view.normal_(1, 0.15, generator=generator)
        if parts[-2] == "kv_norm" or "compressor" in parts:
            view.mul_(1.6)
    elif leaf.startswith("hc_"):
        _fill_hyper_connection(view, leaf, config, generator)
    else:
        view.normal_(0, {"attn_sink": 1.0, "ape": 0.7, "bias": 0.3}[leaf], generator=generator)


def _fill_hyper_connection(view: torch.Tensor, leaf: str, config: ModelConfig, generator: torch.Generator) -> None:
    if leaf.endswith("_fn"):
        view.normal_(0, 1 / math.sqrt(view.shape[1]), generator=generator)
    elif leaf.endswith("_scale"):
        view.uniform_(0.6, 1.2, generator=generator)
    else:
        view.normal_(0, 0.5, generator=generator)
        streams = config.hc_mult
        if view.numel() > streams:  # the combination matrix stays near the identity: streams keep their content
            view[2 * streams :].view(streams, streams).diagonal().add_(1.5)


def fill_distinct(view: torch.Tensor, num_experts: int, generator: torch.Generator) -> None:
    """Distinct random experts per token: the first columns of a random permutation of each row."""
    order = torch.rand(view.shape[0], num_experts, generator=generator, device=view.device).argsort(dim=1)
    view.copy_(order[:, : view.shape[1]])
