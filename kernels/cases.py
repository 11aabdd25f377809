"""Model shapes and random inputs that the `cases.py` of every operation shares."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shapes:
    """The sizes of one model, by the names of config.json."""

    hidden_size: int
    q_lora_rank: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    hc_mult: int
    vocab_size: int
    routed_scaling_factor: float
    swiglu_limit: float


PRO = Shapes(7168, 1536, 128, 512, 64, 16, 1024, 384, 6, 3072, 4, 129280, 2.5, 10.0)
FLASH = Shapes(4096, 1024, 64, 512, 64, 8, 1024, 256, 6, 2048, 4, 129280, 1.5, 10.0)
DEMO = Shapes(256, 128, 8, 128, 64, 2, 64, 12, 2, 128, 4, 3072, 1.5, 10.0)
EDGE = Shapes(384, 128, 6, 72, 8, 3, 128, 5, 3, 128, 3, 131, 1.25, 0.5)  # odd counts, a clamp that bites

MODELS = ("pro", "flash")  # released; what benchmarks run


def released(models: Collection[str]) -> list[tuple[str, Shapes]]:
    """Names and shapes of those of MODELS that are named."""
    return [(name, shapes) for name, shapes in zip(MODELS, (PRO, FLASH), strict=True) if name in models]


@dataclass(frozen=True)
class Run:
    """One named size of inputs; the `cases.py` of an operation adds `make(seed, dtype)`."""

    name: str
    num_tokens: int
    shapes: Shapes


@dataclass(frozen=True)
class Step:
    """A ragged step: position of the first row and number of rows of each request; `num_padding` rows follow them."""

    name: str
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    num_padding: int = 0

    @property
    def num_rows(self) -> int:
        """Rows with the padding."""
        return sum(self.counts) + self.num_padding


# Fields of Run. Small enough for any test are those of SMALL.
RUNS = (
    ("pro", 64, PRO),
    ("flash", 64, FLASH),
    ("demo", 16, DEMO),
    ("edge", 7, EDGE),
    ("one", 1, DEMO),
    ("empty", 0, DEMO),
)
SMALL = ("demo", "edge", "one", "empty")


def generator(seed: int) -> torch.Generator:
    """A CPU generator, so that a case is the same on every machine."""
    return torch.Generator().manual_seed(seed)


def nonzero(random: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal float32 values of any sign that are never near zero, so that a value that was dropped shows."""
    values = torch.randn(*shape, generator=random)
    return (values + torch.where(values < 0, -0.05, 0.05)) * scale


def matrix(random: torch.Generator, *shape: int) -> Tensor:
    """A weight [.., out, in] that keeps the size of its input."""
    return nonzero(random, *shape, scale=shape[-1] ** -0.5)
