"""Named inputs of `gemm`: `linear(**case.make(seed))`, and the products of the released models on a GPU."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4_kernels.cases import RUNS, Run, Shapes, generator, matrix, nonzero
from dsv4_kernels.compressor import cases as compressor
from dsv4_kernels.compressor.beside import prepare_rows
from dsv4_kernels.gemm.fp8 import Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.queries import make_queries
from dsv4_kernels.gemm.triton import linear_fp8
from dsv4_kernels.indexer.queries import prepare_queries
from dsv4_kernels.kv_store.triton import prepare_q, store_kv
from dsv4_kernels.metadata import C4, C128
from dsv4_kernels.norm.triton import rms_norm_fp8


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


OF_WINDOW = ("kv", "kv_norm", "eps", "turns", "rows", "step_planes", "ring_planes", "ring_rows", "window")


class LayerRows:
    """What a layer does with its latents up to its queries, for a step: by `make_queries`, or a few launches apart.

    Args:
        ratio: 0 has no compressors.
        weight: [num_heads * 512 (+ index_heads * I, of a C4 layer), 1536].
        step: whose rows, rings and entries are random; each of the functions advances them.
        sizes: of the rings and states, as `step.make` takes them.
    """

    def __init__(
        self, ratio: int, step: compressor.Case, weight: Fp8Weight, num_heads: int, index_heads: int, seed: int,
        device: torch.device | str = "cpu", **sizes: int,
    ) -> None:  # fmt: skip
        formats = (compressor.MAIN, compressor.INDEX) if ratio == C4 else (compressor.MAIN,)
        self.made = [step.make(ratio or C128, each, seed, device=str(device), **sizes)[0] for each in formats]
        arguments = compressor.row_arguments(ratio or C128, *self.made, seed=seed)
        if not ratio:
            arguments["compressors"] = None
        self.query, self.query_norm = arguments.pop("query"), arguments.pop("query_norm")
        self.arguments, self.weight, self.num_heads = arguments, weight, num_heads
        self.index_weights, self.scale = None, (128 * index_heads) ** -0.5
        if ratio == C4:
            random = torch.Generator(device).manual_seed(seed)
            self.index_weights = torch.randn(step.num_rows, index_heads, generator=random, device=device)

    def norm(self) -> Fp8Rows:
        """What `linear_pair` makes of few rows."""
        return rms_norm_fp8(self.query, self.query_norm, self.arguments["eps"])

    def together(self, normed: Fp8Rows) -> tuple[Tensor, ...]:
        """One launch."""
        given = {"index_weights": self.index_weights, "scale": self.scale}
        return make_queries(normed, self.weight, self.num_heads, **self.arguments, **given)

    def apart(self) -> tuple[Tensor, ...]:
        """Norm, window rows and compressors; the product; and its queries: a launch each."""
        eps, turns, rows = (self.arguments[name] for name in ("eps", "turns", "rows"))
        if self.arguments["compressors"] is None:
            store_kv(*(self.arguments[name] for name in OF_WINDOW))
            normed = self.norm()
        else:
            normed = prepare_rows(self.query, self.query_norm, **self.arguments)
        queries = linear_fp8(normed, self.weight)
        dim = self.arguments["kv"].shape[1]
        if self.index_weights is None:
            return (prepare_q(queries.unflatten(1, (self.num_heads, dim)), eps, turns, rows),)
        return prepare_queries(queries, self.num_heads, dim, eps, self.index_weights, self.scale, turns, rows)
