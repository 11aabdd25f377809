"""Linear layers in plain torch (docs/model.md section 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.quant import fake_quantize_fp8

ACTIVATION_GROUP = 128


def linear(x: Tensor, weight: Tensor, *, quantize: bool = False, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [.., K] times weight float32 or bfloat16 [N, K] transposed, product in float32 -> [.., N].

    Args:
        quantize: round x to E4M3 per 128 along K first, as the official FP8 linears do. `weight` then holds the values
            of its FP8 form; products of two E4M3 values are exact in float32.
        out_dtype: result type, x.dtype by default.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"linear: x has {x.shape[-1]} columns, weight [N, K] has K = {weight.shape[-1]}")
    values = fake_quantize_fp8(x, ACTIVATION_GROUP) if quantize else x
    return torch.nn.functional.linear(values.float(), weight.float()).to(out_dtype or x.dtype)
