"""Sparse attention in plain torch (docs/model.md section 4): window and compressed keys, one softmax, a sink."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.rope import apply_rope

MAX_KEY_ELEMENTS = 1 << 22  # gathered keys [rows, keys, head_dim] are built in row blocks below this


@dataclass(frozen=True)
class Keys:
    """Keys of some rows behind a table of row numbers: int64 [rows, n], -1 = masked."""

    table: Tensor
    read: Callable[[Tensor], Tensor]  # row numbers [..] -> vectors [.., head_dim]; -1 must read finite values


def attend(q: Tensor, keys: Tensor, mask: Tensor, sink: Tensor) -> Tensor:
    """One softmax over the given keys, which are also the values.

    Args:
        q: [rows, heads, d]; keys: [rows, n, d] or shared [n, d]; mask: bool [rows, n], True = visible.
        sink: f32 [heads], a logit that only enlarges the denominator.

    Returns:
        [rows, heads, d] in q.dtype. Scores and sums are float32, probabilities are rounded to q.dtype for the value
        product (a no-op in float32) while the row sum is taken from the unrounded ones.
    """
    keys = keys.float()
    scores = torch.matmul(q.float(), keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = torch.where(mask.unsqueeze(1), scores, -torch.inf)
    sink = sink.view(1, -1, 1)
    top = torch.maximum(scores.amax(dim=-1, keepdim=True), sink)
    probs = torch.exp(scores - top)
    total = probs.sum(dim=-1, keepdim=True) + torch.exp(sink - top)
    return (torch.matmul(probs.to(q.dtype).float(), keys) / total).to(q.dtype)


def sparse_attention(q: Tensor, sources: Sequence[Keys], sink: Tensor, rotations: Tensor) -> Tensor:
    """`attend` over the union of sources per row, then inverse RoPE at the query's position.

    Args:
        q: [rows, heads, d] with RoPE applied; rotations: complex64 [rows, rope_dim / 2] of the same positions.
    """
    num_keys = sum(source.table.shape[1] for source in sources)
    block = max(1, MAX_KEY_ELEMENTS // (num_keys * q.shape[-1]))
    outputs = []
    for first in range(0, q.shape[0], block):
        rows = slice(first, first + block)
        tables = [source.table[rows] for source in sources]
        keys = _join([source.read(table) for source, table in zip(sources, tables, strict=True)])
        outputs.append(attend(q[rows], keys, _join(tables) >= 0, sink))
    output = _join(outputs, dim=0) if outputs else torch.empty_like(q)
    return apply_rope(output, rotations, inverse=True)


def _join(parts: list[Tensor], dim: int = 1) -> Tensor:
    """torch.cat without the copy when there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
