"""The CPU layout of the weights: official names, every value float32, experts stacked.

| runtime tensor | shape | made of |
|---|---|---|
| `<block>.ffn.experts.w13` | [E, 2I, D] | experts.e.w1 rows, then w3 rows |
| `<block>.ffn.experts.w2` | [E, D, I] | experts.e.w2 |
| `<block>.ffn.shared_experts.w13` / `.w2` | [2I, D] / [D, I] | shared_experts.w1 rows, then w3 rows / w2 |
| `<block>.attn.wo_a.weight` | [G, o_lora_rank, (H/G) * head_dim] | wo_a, whose rows are group-major |
| every other official name without `.scale` | as stored | itself; `gate.tid2eid` stays int64 |

`<block>` is `layers.N` or `mtp.0`. One function relates both sides, so loading (copy into the view) and export (read
the view) cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

from dsv4serve.config import ModelConfig
from dsv4serve.weights.inventory import TensorSpec, inventory

_EXPERT = re.compile(r"(.+\.(?:experts|shared_experts))(?:\.(\d+))?\.(w[123])\.weight")


def value_specs(config: ModelConfig) -> Iterator[tuple[str, TensorSpec]]:
    """Official (name, stored spec) of everything that holds values, that is all but the quantisation scales."""
    for name, spec in inventory(config).items():
        if not is_quantization_scale(name, spec):
            yield name, spec


def is_quantization_scale(name: str, spec: TensorSpec) -> bool:
    """True for the E8M0 companion of a quantised weight."""
    return spec.dtype == "F8_E8M0" and name.endswith(".scale")


def allocate(config: ModelConfig, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Uninitialised runtime tensors of the whole model; with device "meta" only their shapes."""
    experts, inner, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for name, spec in value_specs(config):
        match = _EXPERT.fullmatch(name)
        if match:
            stack = () if match[2] is None else (experts,)
            shapes[f"{match[1]}.w13"] = (*stack, 2 * inner, hidden)
            shapes[f"{match[1]}.w2"] = (*stack, hidden, inner)
        elif name.endswith(".attn.wo_a.weight"):
            shapes[name] = (config.o_groups, config.o_lora_rank, spec.shape[1])
        else:
            shapes[name] = spec.shape
    return {name: _empty(name, shape, device) for name, shape in shapes.items()}


def _empty(name: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Matrices lie column by column: with one row of activations the CPU library then reads them 2.5 times faster.
    The embedding is looked up by row, and wo_a's groups must stay one matrix to its official name."""
    if name.endswith(".tid2eid"):
        return torch.empty(shape, dtype=torch.int64, device=device)
    if len(shape) < 2 or name == "embed.weight" or name.endswith(".attn.wo_a.weight"):
        return torch.empty(shape, device=device)
    return torch.empty((*shape[:-2], shape[-1], shape[-2]), device=device).transpose(-1, -2)


def official_view(weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The part of the runtime tensors that the official tensor `name` (not a scale) describes, in its own shape."""
    match = _EXPERT.fullmatch(name)
    if match:
        stack, expert, matrix = match.groups()
        tensor = weights[f"{stack}.w2" if matrix == "w2" else f"{stack}.w13"]
        if expert is not None:
            tensor = tensor[int(expert)]
        if matrix == "w2":
            return tensor
        inner = tensor.shape[0] // 2
        return tensor[:inner] if matrix == "w1" else tensor[inner:]
    if name.endswith(".attn.wo_a.weight"):
        return weights[name].flatten(0, 1)
    return weights[name]
