"""Operations as training runs them on a GPU: products in BF16, and experts whose sizes stay on the device.

Equal to the references, which multiply float32 and split an expert's rows by counts that the host has to wait for (so a
CUDA graph could not hold them). What a checkpoint stores in FP4 or FP8 is exact in BF16: only weights that are not
rounded yet lose bits. Sums are float32; what is rounded to BF16 is so in the reference. Gradients of weights are BF16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from dsv4_kernels.gemm.reference import ACTIVATION_GROUP
from dsv4_kernels.mega_moe.reference import Activations, _activate, _round, shared_expert
from dsv4_kernels.quant import fake_quantize_fp8


def linear(x: Tensor, weight: Tensor, *, quantize: bool = False, out_dtype: torch.dtype | None = None) -> Tensor:
    """The reference's `linear`; in BF16 where x and the result are."""
    values = fake_quantize_fp8(x, ACTIVATION_GROUP) if quantize else x
    if x.dtype is torch.bfloat16 and out_dtype in (None, torch.bfloat16):
        return torch.nn.functional.linear(values, weight.bfloat16())
    return torch.nn.functional.linear(values.float(), weight.float()).to(out_dtype or x.dtype)


def grouped_out_proj(o: Tensor, wo_a: Tensor, wo_b: Tensor, *, quantize: bool) -> Tensor:
    """The reference's `grouped_out_proj` of bfloat16 o [T, H, hd]."""
    grouped = o.reshape(o.shape[0], wo_a.shape[0], wo_a.shape[2]).transpose(0, 1)
    low = torch.bmm(grouped, wo_a.bfloat16().transpose(1, 2)).transpose(0, 1).flatten(1)
    return linear(low, wo_b, quantize=quantize)


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient is a gather too, not a sum by atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse), None, None


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
    quantize_shared: bool,
) -> Tensor:
    """The reference's `mega_moe` of x bfloat16 [T, D], every token with all its experts."""
    num_tokens, num_chosen = expert_ids.shape
    ids = expert_ids.flatten()
    order = torch.argsort(ids, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(ids), device=x.device))
    ends = torch.searchsorted(ids[order], torch.arange(len(w13), device=x.device), right=True).int()
    pairs = _round(x, activations).unsqueeze(1).expand(-1, num_chosen, -1).flatten(0, 1)
    gate_up = grouped_mm(_Permute.apply(pairs, order, inverse), w13.bfloat16().mT, offs=ends)
    share = _Permute.apply(weights.flatten(), order, inverse)
    hidden = _round((_activate(gate_up, limit) * share.unsqueeze(1)).to(x.dtype), activations)
    outputs = grouped_mm(hidden, w2.bfloat16().mT, offs=ends)
    routed = _Permute.apply(outputs, inverse, order).unflatten(0, (num_tokens, num_chosen)).float().sum(1)
    return (routed + shared_expert(x, shared_w13, shared_w2, limit=limit, quantize=quantize_shared)).to(x.dtype)
