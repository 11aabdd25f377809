"""Time of the output projection against its floor, on a GPU: `python -m dsv4_kernels.out_proj.bench OUT.jsonl`.

Bytes: both weights once (1 + 2^-14 bytes a value), o in and the result out in bfloat16; the low-rank rows between the
products are written and read as E4M3 (2 bytes a value together).
FLOPs: 2 T G dg K in bfloat16 and 2 T D G dg in FP8; the floor counts all at the bfloat16 rate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.benching import Measured, measure, num_copies, relative_error, write_lines
from dsv4_kernels.cases import MODELS, Shapes, released
from dsv4_kernels.gemm.cases import Product
from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.gemm.triton import grouped_fp8_out
from dsv4_kernels.out_proj import reference
from dsv4_kernels.out_proj.triton import grouped_out_proj
from dsv4_kernels.quant import dequantize_fp8_blocks

TOKENS = (1, 16, 64, 256, 2048, 8192)
ERROR_TOKENS = 256


def sizes(shapes: Shapes) -> tuple[int, int]:
    """Values of wo_a and of wo_b."""
    low = shapes.o_groups * shapes.o_lora_rank
    return low * (shapes.num_attention_heads // shapes.o_groups * shapes.head_dim), low * shapes.hidden_size


def floor_bytes(shapes: Shapes, num_tokens: int) -> tuple[int, int]:
    """Bytes that the first product and that both must move."""
    wo_a, wo_b = sizes(shapes)
    low, width = shapes.o_groups * shapes.o_lora_rank, shapes.num_attention_heads * shapes.head_dim
    rows = num_tokens * (low + low // 128)
    first = wo_a + wo_a // 16384 + 2 * num_tokens * width + rows
    return first, first + wo_b + wo_b // 16384 + rows + 2 * num_tokens * shapes.hidden_size


def flops(shapes: Shapes, num_tokens: int) -> tuple[int, int]:
    """Floating-point operations of the first product and of both."""
    wo_a, wo_b = sizes(shapes)
    return 2 * num_tokens * wo_a, 2 * num_tokens * (wo_a + wo_b)


def make(shapes: Shapes, num_tokens: int, seed: int, device: torch.device | str) -> tuple[Tensor, Fp8Weight, Fp8Weight]:
    """o bfloat16 [T, H, hd], wo_a, wo_b: random on the device."""
    low, width = shapes.o_groups * shapes.o_lora_rank, shapes.num_attention_heads * shapes.head_dim
    _, wo_a = Product("wo_a", low, width // shapes.o_groups, True).make(0, seed, device)
    _, wo_b = Product("wo_b", shapes.hidden_size, low, True).make(0, seed + 1, device)
    random = torch.Generator(device).manual_seed(seed + 2)
    o = torch.randn(num_tokens, shapes.num_attention_heads, shapes.head_dim, generator=random, device=device)
    return o.bfloat16(), wo_a, wo_b


def by_reference(o: Tensor, wo_a: Fp8Weight, wo_b: Fp8Weight, groups: int) -> Tensor:
    """The reference, which takes the weights' values."""
    first, second = (dequantize_fp8_blocks(weight.codes, weight.exponents) for weight in (wo_a, wo_b))
    return reference.grouped_out_proj(o, first.unflatten(0, (groups, -1)), second, quantize=True)


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """The first product alone and both, for each model and number of tokens; beside them the library in bfloat16."""
    for name, shapes in released(models):
        groups = shapes.o_groups
        for num_tokens in TOKENS:
            moved, work = floor_bytes(shapes, num_tokens), flops(shapes, num_tokens)
            cases = [make(shapes, num_tokens, 3 * seed, "cuda") for seed in range(num_copies(moved[1]))]
            o, wo_a, wo_b = cases[0]
            expected = by_reference(o[:ERROR_TOKENS], wo_a, wo_b, groups)
            error = {"relative_error": relative_error(grouped_out_proj(o, wo_a, wo_b)[:ERROR_TOKENS], expected)}
            wide = [
                (
                    o.flatten(1).unflatten(1, (groups, -1)).transpose(0, 1),
                    wo_a.codes.bfloat16().unflatten(0, (groups, -1)),
                )
                for o, wo_a, _ in cases
            ]
            runs = [
                (
                    "wo_a",
                    "triton",
                    0,
                    [lambda c=case, g=groups: grouped_fp8_out(c[0].flatten(1), c[1], g) for case in cases],
                    {},
                ),
                ("wo_a", "bmm bf16", 0, [lambda c=case: torch.bmm(c[0], c[1].mT) for case in wide], {}),
                ("out_proj", "triton", 1, [lambda c=case: grouped_out_proj(*c) for case in cases], error),
            ]
            for op, label, part, calls, errors in runs:
                yield measure(calls, moved[part], work[part]).as_line(
                    op=op, implementation=label, shapes=name, num_tokens=num_tokens, **errors
                )


if __name__ == "__main__":
    write_lines(lines())
