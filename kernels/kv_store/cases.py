"""Named inputs of `kv_store`: `store_kv(**case.make(seed))` of its Triton kernels. Used by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import DEMO, FLASH, PRO, Shapes
from dsv4_kernels.kv_store.reference import Format, Planes, RowFormat, encode
from dsv4_kernels.metadata.rows import Rows
from dsv4_kernels.norm.reference import rms_norm
from dsv4_kernels.rope import rope_frequencies, rope_table
from dsv4_kernels.rope.reference import apply_rope

POISON = 255  # of rows that nothing may read: NaN in every part of a KV_FP8 row
EPS = 1e-6


def kv_format(shapes: Shapes) -> RowFormat:
    """Main rows of a model."""
    return RowFormat(Format.KV_FP8, shapes.head_dim, shapes.qk_rope_head_dim)


def poisoned_planes(num_rows: int, row_format: RowFormat, device: str = "cpu") -> Planes:
    """Planes in which every row is NaN."""
    return tuple(
        torch.full((num_rows, width), POISON, dtype=torch.uint8, device=device) for width in row_format.plane_bytes
    )


@dataclass(frozen=True)
class Step:
    """The rows of one step: of each request its first position and its number of rows, then padding."""

    name: str
    shapes: Shapes
    requests: tuple[tuple[int, int], ...]
    num_padding: int = 0
    num_drafts: int = 0  # room in the rings
    window: int = 128

    @property
    def ring_rows(self) -> int:
        """Rows of a slot's ring."""
        return self.window + self.num_drafts

    @property
    def slots(self) -> list[int]:
        """Slot of each request: one is always free between two."""
        return [2 * request + 1 for request in reversed(range(len(self.requests)))]

    @property
    def num_slots(self) -> int:
        """Slots of the pool."""
        return 2 * len(self.requests) + 1

    @property
    def num_tokens(self) -> int:
        """Rows without padding."""
        return sum(count for _, count in self.requests)

    def rows(self, device: str = "cpu") -> Rows:
        """Where the rows belong."""
        starts, counts = zip(*self.requests, strict=True) if self.requests else ((0,), (0,))
        per_request = torch.tensor([self.slots or [0], starts, counts], dtype=torch.int32, device=device)
        return Rows.build(*per_request, self.num_tokens + self.num_padding)

    def rotations(self, rows: Rows) -> Tensor:
        """complex64 [rows, rope_dim / 2]."""
        frequencies = rope_frequencies(self.shapes.qk_rope_head_dim, 160_000.0, (16.0, 65_536, 32.0, 1.0))
        return rope_table(rows.positions.clamp_min(0).long(), frequencies)


class Case(Step):
    """Window rows that a step stores."""

    def make(self, seed: int, device: str = "cpu") -> dict[str, Any]:
        """Keyword arguments of `store_kv`; rows of kv are parts of longer rows, as the projection gives them."""
        random = torch.Generator(device).manual_seed(seed)
        rows, dim = self.rows(device), self.shapes.head_dim
        wide = torch.randn(len(rows.slots), 2 * dim, generator=random, device=device)
        wide *= torch.rand(len(rows.slots), 1, generator=random, device=device) * 4 + 0.01
        row_format = kv_format(self.shapes)
        return {
            "latent_kv": wide.bfloat16()[:, dim:],
            "norm_weight": torch.rand(dim, generator=random, device=device) + 0.5,
            "eps": EPS,
            "rotations": self.rotations(rows),
            "rows": rows,
            "step_planes": poisoned_planes(len(rows.slots), row_format, device),
            "ring_planes": poisoned_planes(self.num_slots * self.ring_rows, row_format, device),
            "ring_rows": self.ring_rows,
            "window": self.window,
        }

    def queries(self, seed: int, device: str = "cpu") -> dict[str, Any]:
        """Keyword arguments of `prepare_q`."""
        random = torch.Generator(device).manual_seed(seed)
        rows, heads, dim = self.rows(device), self.shapes.num_attention_heads, self.shapes.head_dim
        wide = torch.randn(len(rows.slots), (heads + 1) * dim, generator=random, device=device).bfloat16()
        return {
            "q": wide[:, : heads * dim].unflatten(1, (heads, dim)),
            "eps": EPS,
            "rotations": self.rotations(rows),
            "rows": rows,
        }


def exact(inputs: dict[str, Any], name: str) -> dict[str, Any]:
    """Inputs whose sums and rotations are exact in float32 in any order, so that all bits must agree."""
    values = (inputs[name].float() * 4).round().clamp(-255, 255) / 16
    rotations = inputs["rotations"]
    turns = torch.tensor([1, 1j, -1, -1j], dtype=torch.complex64, device=rotations.device)
    quarters = torch.arange(rotations.numel(), device=rotations.device).view(rotations.shape) % 4
    return inputs | {name: values.bfloat16(), "rotations": turns[quarters]}


def expected_rows(inputs: dict[str, Any], shapes: Shapes) -> Planes:
    """What the references make of the inputs of `store_kv`, on the CPU."""
    kv = rms_norm(inputs["latent_kv"].cpu(), inputs["norm_weight"].cpu(), inputs["eps"])
    return encode(apply_rope(kv, inputs["rotations"].cpu()), kv_format(shapes))


MIXED = ((0, 1), (0, 3), (70_000, 1), (127, 2), (130, 5), (1_000, 140), (126, 3), (4_096, 128))
SMALL = ((0, 1), (70_000, 1), (127, 2), (130, 5), (1_000, 20))
CASES = [
    Case("pro", PRO, MIXED, num_padding=4, num_drafts=3),
    Case("flash", FLASH, MIXED, num_padding=4),
    Case("demo", DEMO, SMALL, num_padding=4, num_drafts=3),
    Case("one", DEMO, ((5, 1),)),
    Case("empty", DEMO, ()),
]
