"""Mixture of experts in plain torch (docs/model.md sections 8 and 9): routed and shared experts, combined."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dsv4_kernels.gemm import linear
from dsv4_kernels.gemm.reference import ACTIVATION_GROUP
from dsv4_kernels.quant import fake_quantize_fp4, fake_quantize_fp8

Activations = Literal["bf16", "fp8", "fp4"]  # inputs of the products: as they are, E4M3 per 128, E2M1 per 32


def _activate(gate_up: Tensor, limit: float) -> Tensor:
    """SwiGLU with clamp: gate_up [P, 2I] (gate first) -> float32 [P, I]. The gate has no lower clamp."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _round(x: Tensor, activations: Activations) -> Tensor:
    """x rounded to what the products take."""
    if activations == "bf16":
        return x
    return fake_quantize_fp8(x, ACTIVATION_GROUP) if activations == "fp8" else fake_quantize_fp4(x)


def shared_expert(x: Tensor, w13: Tensor, w2: Tensor, *, limit: float, quantize: bool) -> Tensor:
    """w2 swiglu(w13 x) of all rows, [T, D] in x.dtype. Its weights are FP8, and so are its inputs with `quantize`."""
    hidden = _activate(linear(x, w13, quantize=quantize), limit).to(x.dtype)
    return linear(hidden, w2, quantize=quantize)


def mega_moe(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    shared_w13: Tensor,
    shared_w2: Tensor,
    *,
    limit: float,
    activations: Activations,
    quantize_shared: bool | None = None,
) -> Tensor:
    """Sum over a token's experts of w2(weight * swiglu(w13 x)), plus the shared expert: [T, D] in x.dtype.

    Args:
        x: [T, D]; expert_ids int64 [T, K]; weights float32 [T, K].
        w13: float32 or bfloat16 [E, 2I, D], w1 (gate) rows then w3 (up); w2: [E, D, I]; shared_*: the same without E.
        limit: swiglu clamp.
        activations: rounding of the inputs of both products. "fp8" is what the official code does with FP4 experts;
            "fp4" is E2M1 with a power-of-two scale per 32 (W4A4), for tensor cores that multiply FP4 by FP4. Products
            of two such values are exact in float32. "bf16" rounds nothing (x may be float32).
        quantize_shared: whether the shared expert's inputs are E4M3; by default where the routed experts' are rounded.

    The routing weight multiplies before w2. Every product is rounded to x.dtype, their sum is float32.
    """
    check_activations(activations)
    quantize = activations != "bf16" if quantize_shared is None else quantize_shared
    shared = shared_expert(x, shared_w13, shared_w2, limit=limit, quantize=quantize)
    return add_routed(shared, x, expert_ids, weights, w13, w2, limit=limit, activations=activations)


def check_activations(activations: str) -> None:
    """Raises ValueError for anything that is not one of `Activations`."""
    if activations not in get_args(Activations):
        raise ValueError(f"mega_moe: activations is {activations!r}; allowed: {', '.join(get_args(Activations))}")


def add_routed(
    shared: Tensor,
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    limit: float,
    activations: Activations,
) -> Tensor:
    """`mega_moe` given the output of the shared expert [T, D]."""
    order = sort_pairs(expert_ids)
    rounded = _round(x, activations)
    outputs = expert_outputs(rounded, order, expert_ids, weights, w13, w2, limit=limit, activations=activations)
    return combine(shared, outputs, order // expert_ids.shape[1])


def sort_pairs(expert_ids: Tensor) -> Tensor:
    """Numbers token * K + k of all pairs with an expert (id >= 0), sorted by expert, then by number: int64 [pairs]."""
    ids = expert_ids.flatten()
    order = torch.argsort(ids, stable=True)
    return order[int((ids < 0).sum()) :]


def expert_outputs(
    x: Tensor,
    order: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    limit: float,
    activations: Activations,
) -> Tensor:
    """What each pair's expert says, [pairs, D] in x.dtype, in the order of `sort_pairs`.

    `x` [T, D] is rounded already. An expert that is hit is one product over neighbouring rows.
    """
    ids = expert_ids.flatten()[order]
    counts = torch.bincount(ids, minlength=w13.shape[0]).tolist()
    hit = [expert for expert, count in enumerate(counts) if count]
    sizes = [counts[expert] for expert in hit]
    if not hit:
        return x.new_empty(0, x.shape[1])
    rows = x.float().index_select(0, order // expert_ids.shape[1])
    gate_up = torch.cat([part @ w13[expert].t().float() for expert, part in zip(hit, rows.split(sizes), strict=True)])
    hidden = _activate(gate_up.to(x.dtype), limit) * weights.flatten()[order].unsqueeze(1)
    hidden = _round(hidden.to(x.dtype), activations)
    outputs = torch.cat(
        [part @ w2[expert].t().float() for expert, part in zip(hit, hidden.float().split(sizes), strict=True)]
    )
    return outputs.to(x.dtype)


def combine(shared: Tensor, outputs: Tensor, tokens: Tensor) -> Tensor:
    """`shared` [T, D] plus the outputs [pairs, D] of each token, int64 [pairs]: float32, rounded once.

    A new accumulator, added to in the order given, which is that of expert ids: the same sum whatever else is in the
    batch.
    """
    total = torch.zeros(shared.shape, dtype=torch.float32, device=shared.device)
    total.index_add_(0, tokens, outputs.float())
    return (total + shared.float()).to(shared.dtype)
