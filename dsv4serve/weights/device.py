"""The device layout of the weights: FP8 and FP4 as in the checkpoint, products over one input stacked to one matrix.

| runtime weight | kind | made of, one below the other |
|---|---|---|
| `<block>.attn.latent` | FP8 | wq_a, wkv |
| `<block>.attn.query` | FP8 | wq_b, indexer.wq_b |
| `<block>.attn.raw` | BF16 | compressor wkv, wgate, indexer.compressor wkv, wgate, indexer.weights_proj |
| `<block>.ffn.shared_experts.w13` | FP8 | shared_experts.w1, w3 |
| `<block>.ffn.experts.w13` / `.w2` | FP4 [E, ..] | experts.e.w1, w3 / experts.e.w2 |
| every other official name without `.scale` | FP8, or BF16 matrix | as stored |
| the same, vectors, and F32 | float32; `gate.tid2eid` int32 | as stored |

`<block>` is `layers.N` or `mtp.0`. Each is allocated once, on the device, and filled in place: there are never two
copies. The MTP block is left out where no drafts are wanted: one of Pro takes as much as any layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels.gemm.fp8 import GROUP, Fp8Weight
from dsv4_kernels.mega_moe.weights import Form, Fp4Weight, empty_experts, write_expert
from dsv4serve.config import ModelConfig
from dsv4serve.types import CapacityError
from dsv4serve.weights.inventory import TensorSpec, inventory
from dsv4serve.weights.layout import is_quantization_scale

DeviceWeight = Tensor | Fp8Weight | Fp4Weight
STACKS = {
    "attn.latent": ("attn.wq_a", "attn.wkv"),
    "attn.query": ("attn.wq_b", "attn.indexer.wq_b"),
    "attn.raw": (
        *("attn.compressor.wkv", "attn.compressor.wgate"),
        *("attn.indexer.compressor.wkv", "attn.indexer.compressor.wgate", "attn.indexer.weights_proj"),
    ),
    "ffn.shared_experts.w13": ("ffn.shared_experts.w1", "ffn.shared_experts.w3"),
}
_STACK_OF = {part: (stack, parts) for stack, parts in STACKS.items() for part in parts}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(w[123])\.weight")
_BLOCK = re.compile(r"((?:layers|mtp)\.\d+\.)(.+)\.weight")


class Place(NamedTuple):
    """Where an official tensor lies: rows first_row .. of a runtime weight, for experts of one of its matrices."""

    weight: str
    first_row: int
    expert: int


def device_specs(config: ModelConfig, has_drafts: bool) -> dict[str, TensorSpec]:
    """Official name -> stored spec of all that the device holds, scales included; of the MTP block only for drafts."""
    return {name: spec for name, spec in inventory(config).items() if has_drafts or not name.startswith("mtp.")}


def device_bytes(config: ModelConfig, has_drafts: bool) -> int:
    """Bytes of the device layout, with a scale for each row of an expert, which the form for Hopper has."""
    total = 0
    for name, spec in device_specs(config, has_drafts).items():
        is_value = not is_quantization_scale(name, spec)
        widened = 2 if is_value and spec.dtype == "BF16" and len(spec.shape) == 1 else 1
        total += spec.num_bytes * widened // (2 if spec.dtype == "I64" else 1)
        total += spec.shape[0] if spec.dtype == "I8" else 0
    return total


def require_device_memory(config: ModelConfig, has_drafts: bool, free_bytes: int) -> None:
    """Raise CapacityError when the weights do not fit into the memory that the device has left."""
    needed = device_bytes(config, has_drafts)
    if needed > free_bytes:
        raise CapacityError(f"the weights need {needed:,} bytes on the device; {free_bytes:,} are free")


class DeviceWeights:
    """The runtime weights of a model on `device`, uninitialised until `put` or a dummy fills them.

    Args:
        form: of the experts, see `mega_moe.weights`.
        has_drafts: with the MTP block.
    """

    def __init__(self, config: ModelConfig, device: torch.device, form: Form, has_drafts: bool) -> None:
        all_specs = device_specs(config, has_drafts)
        specs = {name: spec for name, spec in all_specs.items() if not is_quantization_scale(name, spec)}
        self.specs = specs  # official name -> stored spec of what holds values
        self.places = {name: _place(name, specs) for name in specs}
        rows: dict[str, int] = {}
        for name, place in self.places.items():
            if place.expert <= 0:
                rows[place.weight] = max(rows.get(place.weight, 0), place.first_row + specs[name].shape[0])
        self.weights: dict[str, DeviceWeight] = {}
        for name, place in self.places.items():
            if place.weight not in self.weights:
                num_rows = rows[place.weight]
                self.weights[place.weight] = _allocate(specs[name], num_rows, config.n_routed_experts, device, form)

    def put(self, name: str, values: Tensor, scale: Tensor | None = None) -> int:
        """Store the official tensor `name`: its values, or codes and their E8M0 scales. Returns how many groups of FP4
        codes had to be rounded for that."""
        target = self.weights[self.places[name].weight]
        if isinstance(target, Fp4Weight):
            assert scale is not None
            place = self.places[name]
            device = target.values.device
            return write_expert(target, place.expert, place.first_row, values.to(device), scale.to(device))
        view, exponents = self.view(name)
        if exponents is None:
            view.copy_(values)
        else:
            assert scale is not None
            view.view(torch.uint8).copy_(values.view(torch.uint8))
            exponents.copy_(scale.view(torch.uint8))
        return 0

    def view(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The part of a runtime weight that the official tensor `name` describes, and its exponents if it is FP8."""
        weight, first, _ = self.places[name]
        target, num_rows = self.weights[weight], self.specs[name].shape[0]
        assert not isinstance(target, Fp4Weight)
        if isinstance(target, Fp8Weight):
            exponents = target.exponents[first // GROUP : (first + num_rows) // GROUP]
            return target.codes[first : first + num_rows], exponents
        return target[first : first + num_rows], None

    def experts(self) -> Iterator[tuple[str, Fp4Weight]]:
        """The weights of routed experts."""
        for name, weight in self.weights.items():
            if isinstance(weight, Fp4Weight):
                yield name, weight


def _place(name: str, specs: dict[str, TensorSpec]) -> Place:
    match = _EXPERT.fullmatch(name)
    if match:
        stack, expert, matrix = match.groups()
        first = specs[name].shape[0] if matrix == "w3" else 0
        return Place(f"{stack}.w2" if matrix == "w2" else f"{stack}.w13", first, int(expert))
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _STACK_OF:
        return Place(name, 0, -1)
    stack, parts = _STACK_OF[match[2]]
    above = (f"{match[1]}{part}.weight" for part in parts[: parts.index(match[2])])
    return Place(match[1] + stack, sum(specs[part].shape[0] for part in above), -1)


def _allocate(spec: TensorSpec, num_rows: int, num_experts: int, device: torch.device, form: Form) -> DeviceWeight:
    if spec.dtype == "I8":
        return empty_experts(num_experts, num_rows, 2 * spec.shape[1], form=form, device=device)
    if spec.dtype == "F8_E4M3":
        depth = spec.shape[1]
        codes = torch.empty(num_rows, depth, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        exponents = torch.empty(num_rows // GROUP, depth // GROUP, dtype=torch.uint8, device=device)
        return Fp8Weight(codes, exponents)
    dtype = torch.int32 if spec.dtype == "I64" else torch.float32
    if spec.dtype == "BF16" and len(spec.shape) > 1:
        dtype = torch.bfloat16
    return torch.empty(num_rows, *spec.shape[1:], dtype=dtype, device=device)
