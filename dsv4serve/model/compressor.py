"""Parameters of one KV compressor (docs/model.md section 5); the pooling itself is `dsv4_kernels.compressor`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4_kernels.compressor import finish


class Compressor:
    """Projections, position bias and norm that turn raw rows into entries of one width.

    Args:
        params: float32 tensors by official name, prefix e.g. "layers.2.attn.compressor.".
        ratio: 4 (two overlapping halves, width 2 * d) or 128 (width d).
    """

    def __init__(self, params: Mapping[str, Tensor], prefix: str, ratio: int, eps: float) -> None:
        self.ratio, self.eps = ratio, eps
        self.projections = [params[prefix + "wkv.weight"], params[prefix + "wgate.weight"]]
        self.width = self.projections[0].shape[0]
        ape = params[prefix + "ape"]  # [ratio, width]
        self.bias = torch.cat([torch.zeros_like(ape), ape], dim=-1)  # the kv half of a raw row takes none
        self.norm = params[prefix + "norm.weight"]

    def add_ape(self, raw: Tensor, positions: Tensor) -> Tensor:
        """Raw rows f32 [rows, 2 * width] (kv | gate) plus the position bias of the gates."""
        return raw + torch.nn.functional.embedding(positions % self.ratio, self.bias)

    def entries(self, pooled: Tensor, rotations: Tensor, dtype: torch.dtype) -> Tensor:
        """Pooled values f32 [n, d] -> entries [n, d] in `dtype`. `rotations` are those of each block's first token."""
        return finish(pooled, self.norm, self.eps, rotations, dtype)
