"""Matrices as bfloat16 where that loses nothing: much of a decode step on CPU is reading them."""

from __future__ import annotations

import torch
from torch import Tensor

_AS_THEY_ARE = ("embed.weight", ".gate.weight")  # looked up by row; read by the router, which is small


def halve(weights: dict[str, Tensor]) -> None:
    """Replace every matrix of `weights` (see `layout`) that linear layers or experts read and bfloat16 holds exactly.

    All of the official formats are such: BF16, and FP8 and FP4 times powers of two. Layouts stay.
    """
    for name, tensor in weights.items():
        if tensor.dim() < 2 or name.endswith(_AS_THEY_ARE) or not name.endswith((".weight", ".w13", ".w2")):
            continue
        half = tensor.bfloat16()
        if torch.equal(half.float(), tensor):
            weights[name] = half
