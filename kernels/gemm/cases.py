"""Named inputs of `gemm`: `linear(**case.make(seed))`, and the products of the released models on a GPU."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4_kernels.cases import RUNS, Run, Shapes, generator, matrix, nonzero
from dsv4_kernels.gemm.fp8 import Fp8Weight


class Case(Run):
    """The first query projection."""

    def make(self, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of `linear`; activations in `dtype`, never zero."""
        random, sizes = generator(seed), self.shapes
        x = nonzero(random, self.num_tokens, sizes.hidden_size).to(dtype)
        return {"x": x, "weight": matrix(random, sizes.q_lora_rank, sizes.hidden_size)}


CASES = [Case(*run) for run in RUNS]

INDEX_HEADS, INDEX_DIM = 64, 128  # of the released models


class Product(NamedTuple):
    """One weight of a layer (or the head): [num_rows, depth]."""

    name: str
    num_rows: int
    depth: int
    fp8: bool

    def make(self, num_tokens: int, seed: int, device: torch.device | str) -> tuple[Tensor, Fp8Weight | Tensor]:
        """x bfloat16 [T, depth], random on the device, and a weight that keeps its size: blocks of several scales."""
        random = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, device=device)

        x = normal(num_tokens, self.depth).bfloat16()
        weight = normal(self.num_rows, self.depth)
        if not self.fp8:
            return x, (weight * self.depth**-0.5).bfloat16()
        shape = -(-self.num_rows // 128), self.depth // 128
        exponents = (
            torch.randint(-4, 4, shape, generator=random, device=device) + 127 - round(math.log2(self.depth) / 2)
        )
        return x, Fp8Weight(weight.to(torch.float8_e4m3fn), exponents.to(torch.uint8))


def products(shapes: Shapes) -> list[Product]:
    """The stacked products of a layer with C4 compression, of the shared expert, and the head."""
    hidden, heads = shapes.hidden_size, shapes.num_attention_heads * shapes.head_dim
    raw = 4 * shapes.head_dim + 4 * INDEX_DIM + INDEX_HEADS  # compressors: keys and gates, two series; head weights
    return [
        Product("wq_a+wkv", shapes.q_lora_rank + shapes.head_dim, hidden, True),
        Product("wq_b", heads, shapes.q_lora_rank, True),
        Product("wq_b+index", heads + INDEX_HEADS * INDEX_DIM, shapes.q_lora_rank, True),
        Product("raw", raw, hidden, False),
        Product("wo_b", hidden, shapes.o_groups * shapes.o_lora_rank, True),
        Product("shared_w13", 2 * shapes.moe_intermediate_size, hidden, True),
        Product("shared_w2", hidden, shapes.moe_intermediate_size, True),
        Product("head", shapes.vocab_size, hidden, False),
    ]
