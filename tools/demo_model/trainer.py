"""Weights, optimisers and one update of the demo model's training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed
from torch import Tensor

from dsv4serve.config import ExpertActivations, ModelConfig
from tools.demo_model.captured import Part, capture
from tools.demo_model.muon import Muon
from tools.demo_model.network import Losses, losses, total_loss
from tools.demo_model.rounding import rounded, stored_dtypes
from tools.demo_model.schedule import CATEGORIES, MICRO_BATCHES, Phase

EMBEDDING_RATE = 4.0  # times the learning rate: its rows are seen rarely
MIX_RATE = 0.2  # times the learning rate: the mixes of mHC sum over all streams
MAX_NORM = 1.0
BIAS_RATE = 1e-3  # of the routers' balancing biases
SUMS = {"index", *(name + of for name in ("main", "mtp", "right") for of in ("", "_tokens"))}


def is_matrix(name: str, weight: Tensor) -> bool:
    """What Muon trains: dense and expert matrices. Embedding, head, routers, mixes and vectors go to AdamW."""
    others = ("embed.", "head.", ".gate.", "hc_", ".ape", ".weights_proj.", "norm.")
    return weight.ndim >= 2 and weight.is_floating_point() and not any(part in name for part in others)


def _add(totals: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        totals[name] = totals[name] + value if name in totals else value


def _sum_over_ranks(gradients: Iterable[Tensor], *named: dict[str, Tensor]) -> None:
    """Replace all values by their sums over the ranks, if there are several: one message a step."""
    if not torch.distributed.is_initialized():
        return
    values = [*gradients, *(value for mapping in named for value in mapping.values())]
    message = torch.cat([value.flatten() for value in values])
    torch.distributed.all_reduce(message)
    for value, summed in zip(values, message.split([value.numel() for value in values]), strict=True):
        value.copy_(summed.view_as(value))


class Trainer:
    """Weights, optimisers and the step.

    Args:
        first_part: which part of a step this rank's first one is.
        captured: run parts as CUDA graphs.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        device: str,
        first_part: int = 0,
        captured: bool = False,
    ) -> None:
        self.config, self._first_part, self._captured = config, first_part, captured
        self._phase: Phase | None = None
        self._parts: Mapping[str, Part] = {}
        self.dtypes = stored_dtypes(config, weights)
        self.weights = {name: weight.to(device).contiguous() for name, weight in weights.items()}
        self.learnt = {
            name: weight.requires_grad_()
            for name, weight in self.weights.items()
            if weight.is_floating_point() and not name.endswith("gate.bias")
        }
        for weight in self.learnt.values():
            weight.grad = torch.zeros_like(weight)
        matrices, groups = [], {scale: [] for scale in (1.0, EMBEDDING_RATE, MIX_RATE)}
        for name, weight in self.learnt.items():
            if is_matrix(name, weight):
                matrices.append(weight)
            else:
                scale = EMBEDDING_RATE if name == "embed.weight" else MIX_RATE if name.endswith("_fn") else 1.0
                groups[scale].append(weight)
        self.muon = Muon(matrices, weight_decay=0.02)
        scaled = [{"params": weights, "scale": scale} for scale, weights in groups.items()]
        self.adam = torch.optim.AdamW(scaled, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=device == "cuda")

    def step(self, parts: Sequence[tuple[Tensor, Tensor]], phase: Phase, rate: float) -> dict[str, Tensor]:
        """One update on this rank's parts of it: tokens int64 and categories uint8 [batch, length + 2], 0 where a token
        is not learnt. Returns sums to log, of all ranks."""
        if phase != self._phase:
            self._begin(phase, *parts[0])
        loads: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for place, (tokens, categories) in enumerate(parts, start=self._first_part):
            found = self._parts[phase.activations[place % len(phase.activations)]](tokens, categories)
            _add(loads, {name: found.pop(name).float() for name in found.keys() - SUMS})
            _add(sums, found)
        _sum_over_ranks([weight.grad for weight in self.learnt.values()], loads, sums)
        norm = torch.nn.utils.clip_grad_norm_(list(self.learnt.values()), MAX_NORM)
        for group in self.adam.param_groups:
            group["lr"] = rate * group["scale"]
        self.adam.step()
        self.muon.step(rate)
        self._clear_gradients()
        self._balance(loads)
        imbalance = torch.stack([load.max() / load.mean() for load in loads.values()]).max()
        return sums | {"norm": norm, "imbalance": imbalance}

    def _begin(self, phase: Phase, tokens: Tensor, categories: Tensor) -> None:
        """What runs a part of this phase, by the rounding of the experts' inputs."""
        self._phase, self._parts = phase, {}  # the graphs of the last phase give their memory back
        self._parts = {kind: partial(self._part, phase, kind) for kind in dict.fromkeys(phase.activations)}
        if self._captured:
            self._parts = capture(self._parts, tokens, categories)
            self._clear_gradients()

    def _part(
        self, phase: Phase, activations: ExpertActivations, tokens: Tensor, categories: Tensor
    ) -> dict[str, Tensor]:
        """Add a part's gradients. Returns the sums of `_sums`, and the loads int64 [E] by MoE name."""
        weights = rounded(self.weights, self.dtypes) if phase.round_weights else self.weights
        found = losses(self.config, weights, tokens, phase.select, activations)
        (total_loss(found, categories > 0) / MICRO_BATCHES).backward()
        return self._sums(found, categories) | found.loads

    def _clear_gradients(self) -> None:
        torch._foreach_zero_([weight.grad for weight in self.learnt.values()])

    @torch.no_grad()
    def _balance(self, loads: dict[str, Tensor]) -> None:
        """Auxiliary-loss-free balancing: experts with too many tokens become less likely, the others more."""
        for name, load in loads.items():
            bias = self.weights.get(f"{name}.gate.bias")
            if bias is not None:
                bias.add_(torch.sign(load.mean() - load), alpha=BIAS_RATE)

    @torch.no_grad()
    def _sums(self, found: Losses, categories: Tensor) -> dict[str, Tensor]:
        length, bins = found.main.shape[1], len(CATEGORIES) + 1
        result = {"index": found.index.detach() / MICRO_BATCHES}
        for name, values, shift in (("main", found.main, 1), ("mtp", found.mtp, 2), ("right", found.right.float(), 1)):
            index = categories[:, shift : length + shift].flatten().long()
            zero = torch.zeros(bins, device=values.device)
            result[name] = zero.index_add(0, index, values.flatten())
            result[f"{name}_tokens"] = zero.index_add(0, index, torch.ones_like(values.flatten()))
        return result
