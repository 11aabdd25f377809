"""Time of the router against its floor, on a GPU: `python -m dsv4_kernels.router.bench OUT.jsonl`.

As the engine calls it: x is rounded and the tiles of the experts are filled too.
Bytes: the gate's weight (BF16) and x once, rounded x; 12 bytes for each choice. FLOPs: 2 E D a token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch

from dsv4_kernels.benching import Measured, measure, num_copies, relative_error, write_lines
from dsv4_kernels.cases import MODELS, Shapes, released
from dsv4_kernels.mega_moe.tiles import empty_tiles
from dsv4_kernels.mega_moe.triton import choose_tile
from dsv4_kernels.router import reference
from dsv4_kernels.router.triton import route

TOKENS = (1, 8, 64, 256, 2048, 8192)


def floor_bytes(shapes: Shapes, num_tokens: int) -> int:
    """Bytes that one layer's choice must move."""
    choice = 12 * num_tokens * shapes.num_experts_per_tok
    return 2 * shapes.hidden_size * (2 * num_tokens + shapes.n_routed_experts) + choice


def flops(shapes: Shapes, num_tokens: int) -> int:
    """Floating-point operations of the scores."""
    return 2 * num_tokens * shapes.n_routed_experts * shapes.hidden_size


def make(shapes: Shapes, num_tokens: int) -> dict[str, Any]:
    """Arguments of `route` on the device."""
    weight = torch.randn(shapes.n_routed_experts, shapes.hidden_size, device="cuda") * shapes.hidden_size**-0.5
    return {
        "x": torch.randn(num_tokens, shapes.hidden_size, device="cuda").bfloat16(),
        "gate_weight": weight.bfloat16(),
        "bias": torch.randn(shapes.n_routed_experts, device="cuda") * 0.3,
        "tid2eid": None,
        "token_ids": torch.zeros(num_tokens, dtype=torch.int64, device="cuda"),
        "top_k": shapes.num_experts_per_tok,
        "scale": shapes.routed_scaling_factor,
    }


def extras(shapes: Shapes, num_tokens: int) -> dict[str, Any]:
    """What the engine has the router do besides."""
    num_experts, top_k = shapes.n_routed_experts, shapes.num_experts_per_tok
    tile = choose_tile(num_tokens, top_k, num_experts, "fp8")
    return {
        "rounded": torch.empty(num_tokens, shapes.hidden_size, device="cuda", dtype=torch.bfloat16),
        "tiles": empty_tiles(num_tokens * top_k, num_experts, tile, torch.device("cuda")),
    }


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """One line for each implementation, model and number of tokens."""
    for name, shapes in released(models):
        for num_tokens in TOKENS:
            moved, work = floor_bytes(shapes, num_tokens), flops(shapes, num_tokens)
            some = [make(shapes, num_tokens) for _ in range(num_copies(moved))]
            plain = [one | {"gate_weight": one["gate_weight"].float()} for one in some]
            both = route(**some[0])[0], reference.route(**plain[0])[0]
            error = relative_error(*(weights.sort(dim=1).values for weights in both))
            ours = [partial(route, **one, **extras(shapes, num_tokens)) for one in some]
            for label, calls, extra in (
                ("triton", ours, {"relative_error": error}),
                ("reference", [partial(reference.route, **one) for one in plain], {}),
            ):
                yield measure(calls, moved, work).as_line(
                    op="route", implementation=label, shapes=name, num_tokens=num_tokens, **extra
                )


if __name__ == "__main__":
    write_lines(lines())
