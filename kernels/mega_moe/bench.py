"""Time of the routed experts against their floor, on a GPU: `python -m dsv4_kernels.mega_moe.bench OUT.jsonl`.

Bytes: the FP4 weights of the experts that are hit, with their scales (17/32 byte a value), x and the shared expert's
output read, the result written, BF16.
FLOPs: 6 D I for each pair of token and expert. Below some hundred tokens on Pro the bytes decide.

The floor of the FLOPs is the bf16 rate, which is what Hopper multiplies with; see triton.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.benching import Measured, measure, num_copies, relative_error, write_lines
from dsv4_kernels.cases import MODELS, Shapes, released
from dsv4_kernels.mega_moe.cases import packed_weight, routed_tokens
from dsv4_kernels.mega_moe.reference import Activations, add_routed
from dsv4_kernels.mega_moe.triton import mega_moe
from dsv4_kernels.mega_moe.weights import Fp4Weight, relayout
from dsv4_kernels.quant import dequantize_fp4_weight

TOKENS = (1, 8, 64, 256, 2048, 8192)
OTHERS = (64, 2048)  # tokens for which the other activations are timed too
ERROR_TOKENS, ERROR_EXPERTS = 8, 12  # of the comparison with the reference, whose weights are float32


def floor_bytes(shapes: Shapes, num_tokens: int, num_hit: int) -> int:
    """Bytes that one layer must move when `num_hit` experts have a token."""
    expert = 3 * shapes.hidden_size * shapes.moe_intermediate_size * 17 // 32
    return num_hit * expert + 3 * 2 * num_tokens * shapes.hidden_size


def flops(shapes: Shapes, num_tokens: int) -> int:
    """Floating-point operations of one layer."""
    return 6 * num_tokens * shapes.num_experts_per_tok * shapes.hidden_size * shapes.moe_intermediate_size


def layer(random: torch.Generator, shapes: Shapes) -> tuple[dict[str, Fp4Weight], dict[str, Tensor]]:
    """All experts as the kernels read them, and the first few as the reference does."""
    hidden, width, num_experts = shapes.hidden_size, shapes.moe_intermediate_size, shapes.n_routed_experts
    weights, values = {}, {}
    for name, size in (("w13", (2 * width, hidden)), ("w2", (hidden, width))):
        packed, scale = packed_weight(random, num_experts, *size)
        pairs = zip(packed[:ERROR_EXPERTS], scale[:ERROR_EXPERTS], strict=True)
        values[name] = torch.stack([dequantize_fp4_weight(*pair).bfloat16() for pair in pairs])  # exact
        native = torch.cuda.get_device_capability() >= (10, 0)
        weights[name] = relayout(packed, scale, unpacked=not native)
    return weights, values


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """One line for each model, number of tokens and choice of activations."""
    random = torch.Generator("cuda").manual_seed(0)
    for name, shapes in released(models):
        weights, values = layer(random, shapes)
        options = {"limit": shapes.swiglu_limit}
        tokens = routed_tokens(random, ERROR_TOKENS, shapes)
        tokens["expert_ids"] = tokens["expert_ids"] % ERROR_EXPERTS
        for num_tokens in TOKENS:
            some = [routed_tokens(random, num_tokens, shapes)]
            hit = len(some[0]["expert_ids"].unique())
            moved = floor_bytes(shapes, num_tokens, hit)
            some += [routed_tokens(random, num_tokens, shapes) for _ in range(1, num_copies(moved))]
            for activations in chosen(name, num_tokens, weights["w13"]):
                run = partial(mega_moe, **options, **weights, activations=activations)
                expected = add_routed(**tokens, **values, **options, activations=activations)
                yield measure([partial(run, **one) for one in some], moved, flops(shapes, num_tokens)).as_line(
                    op="mega_moe",
                    implementation=f"triton {activations}",
                    shapes=name,
                    num_tokens=num_tokens,
                    num_hit=hit,
                    relative_error=relative_error(run(**tokens), expected),
                )
        del weights, values
        torch.cuda.empty_cache()


def chosen(name: str, num_tokens: int, weight: Fp4Weight) -> tuple[Activations, ...]:
    """The official rounding everywhere; the others at two sizes of Pro."""
    if name != "pro" or num_tokens not in OTHERS:
        return ("fp8",)
    return ("fp8", "fp4", "bf16") if weight.unpacked else ("fp8", "fp4")


if __name__ == "__main__":
    write_lines(lines())
