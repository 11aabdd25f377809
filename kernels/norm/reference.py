"""RMSNorm in plain torch (docs/model.md section 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dim: [.., D] -> x.dtype, float32 inside, rounded once."""
    return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)


def head_norm(q: Tensor, eps: float) -> Tensor:
    """RMS of each head without a weight: q [T, heads, d] -> the same shape and dtype.

    In the activation dtype: the official code rounds square, mean, root and product to BF16. The root is
    taken in float32, as on a GPU: of fewer than 32 BF16 values torch's CPU code would round the square root first.
    """
    mean = q.square().mean(-1, keepdim=True) + eps
    return q * torch.rsqrt(mean.float()).to(q.dtype)
