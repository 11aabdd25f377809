"""Time of the experts against their floor, on a GPU: `python -m dsv4_kernels.mega_moe.bench OUT.jsonl`.

What is timed is what a layer of the engine launches behind the router: both products of the routed experts and of the
shared one (`expert_parts`), from x that is rounded and tiles that are filled to parts that are not added.
Bytes: the FP4 weights of the experts that are hit, with their scales (17/32 byte a value), the shared expert's FP8
ones, x read in BF16 and in FP8, K + 1 parts a token written, BF16.
FLOPs: 6 D I for each expert of a token, and for the shared one. Below some hundred tokens on Pro the bytes decide.

On Hopper large tiles of FP8 activations have two lines, "gluon" of hopper.py and "triton" of experts.py.

The floor of the FLOPs is the rate of what the weights' form multiplies: "bf16", else FP8's. Lines before 27 November
have the bf16 rate and form for FP8 activations on Hopper, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor

from dsv4_kernels.benching import Measured, measure, num_copies, relative_error, write_lines
from dsv4_kernels.capability import is_hopper
from dsv4_kernels.cases import MODELS, Shapes, released
from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.mega_moe import hopper, reference, triton
from dsv4_kernels.mega_moe.cases import packed_weight, routed_tokens
from dsv4_kernels.mega_moe.reference import Activations
from dsv4_kernels.mega_moe.tiles import make_tiles
from dsv4_kernels.mega_moe.triton import choose_tile, expert_parts, mega_moe, rounded_inputs
from dsv4_kernels.mega_moe.weights import Form, form_for, relayout
from dsv4_kernels.quant import dequantize_fp4_weight, dequantize_fp8_blocks, quantize_fp8_blocks

TOKENS = (1, 8, 64, 256, 2048, 8192)
OTHERS = (64, 2048)  # tokens for which the other activations are timed too
ERROR_TOKENS, ERROR_EXPERTS = 8, 12  # of the comparison with the reference, whose weights are float32


def routed_bytes(shapes: Shapes, num_hit: int) -> int:
    """Bytes of the weights of `num_hit` routed experts."""
    return num_hit * 3 * shapes.hidden_size * shapes.moe_intermediate_size * 17 // 32


def routed_flops(shapes: Shapes, num_tokens: int) -> int:
    """Floating-point operations of the routed experts of a layer."""
    return 6 * num_tokens * shapes.num_experts_per_tok * shapes.hidden_size * shapes.moe_intermediate_size


def floor_bytes(shapes: Shapes, num_tokens: int, num_hit: int) -> int:
    """Bytes that one layer must move when `num_hit` experts have a token."""
    shared = 3 * shapes.hidden_size * shapes.moe_intermediate_size
    row = (2 + 1 + 2 * (shapes.num_experts_per_tok + 1)) * shapes.hidden_size
    return routed_bytes(shapes, num_hit) + shared + num_tokens * row


def flops(shapes: Shapes, num_tokens: int) -> int:
    """Floating-point operations of one layer."""
    top_k = shapes.num_experts_per_tok
    return routed_flops(shapes, num_tokens) // top_k * (top_k + 1)


def layer(random: torch.Generator, shapes: Shapes, form: Form) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All experts as the kernels read them, and the first few and the shared one as the reference does."""
    hidden, width, num_experts = shapes.hidden_size, shapes.moe_intermediate_size, shapes.n_routed_experts
    weights: dict[str, Any] = {}
    values = {}
    for name, size in (("w13", (2 * width, hidden)), ("w2", (hidden, width))):
        packed, scale = packed_weight(random, num_experts, *size)
        pairs = zip(packed[:ERROR_EXPERTS], scale[:ERROR_EXPERTS], strict=True)
        values[name] = torch.stack([dequantize_fp4_weight(*pair).bfloat16() for pair in pairs])  # exact
        weights[name] = relayout(packed, scale, form=form)
        codes, scale = quantize_fp8_blocks(torch.randn(size, device="cuda", generator=random) * size[1] ** -0.5)
        values[f"shared_{name}"] = dequantize_fp8_blocks(codes, scale)
        weights[f"shared_{name}"] = Fp8Weight.from_checkpoint(codes, scale)
    return weights, values


def prepared(tokens: dict[str, Tensor], weights: dict[str, Any], activations: Activations) -> dict[str, Any]:
    """Arguments of `expert_parts`."""
    (num_tokens, top_k), num_experts = tokens["expert_ids"].shape, weights["w13"].num_experts
    inputs, scales = rounded_inputs(tokens["x"], activations, weights["w13"].form)
    return weights | {
        "inputs": inputs,
        "input_scales": scales,
        "rows": quantize_rows(tokens["x"]),
        "weights": tokens["weights"],
        "tiles": make_tiles(
            tokens["expert_ids"], num_experts, choose_tile(num_tokens, top_k, num_experts, weights["w13"].form)
        ),
        "activations": activations,
    }


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """One line for each model, number of tokens and choice of activations."""
    random = torch.Generator("cuda").manual_seed(0)
    for name, shapes in released(models):
        limit = shapes.swiglu_limit
        for activations in get_args(Activations) if name == "pro" else ("fp8",):
            weights, values = layer(random, shapes, form_for(activations, torch.cuda.get_device_capability()[0]))
            few = tokens_of(random, ERROR_TOKENS, shapes)
            few["expert_ids"] = few["expert_ids"] % ERROR_EXPERTS
            options = {"limit": limit, "activations": activations}
            peak = "bf16" if weights["w13"].form == "bf16" else "fp8"
            expected = reference.mega_moe(**few, **values, **options, quantize_shared=True)
            error = relative_error(mega_moe(**few, **weights, **options), expected)
            for num_tokens in TOKENS if activations == "fp8" else OTHERS:
                some = [tokens_of(random, num_tokens, shapes)]
                hit = len(some[0]["expert_ids"].unique())
                moved = floor_bytes(shapes, num_tokens, hit)
                some += [tokens_of(random, num_tokens, shapes) for _ in range(1, num_copies(moved))]
                given = [prepared(one, weights, activations) for one in some]
                calls = [partial(expert_parts, **one, limit=limit) for one in given]
                two = given[0]["tiles"].tile_tokens == hopper.TOKENS.value and weights["w13"].form == "fp8"
                for label in ("gluon", "triton") if two and is_hopper(random.device) else ("triton",):
                    with mock.patch.object(triton, "is_hopper", lambda device, label=label: label == "gluon"):
                        measured = measure(calls, moved, flops(shapes, num_tokens), peak=peak)
                    yield measured.as_line(
                        op="mega_moe",
                        implementation=f"{label} {activations}",
                        shapes=name,
                        num_tokens=num_tokens,
                        num_hit=hit,
                        relative_error=error,
                    )
            del weights, values
            torch.cuda.empty_cache()


def tokens_of(random: torch.Generator, num_tokens: int, shapes: Shapes) -> dict[str, Tensor]:
    """x, experts and their weights."""
    tokens = routed_tokens(random, num_tokens, shapes)
    return {key: tokens[key] for key in ("x", "expert_ids", "weights")}


if __name__ == "__main__":
    write_lines(lines())
