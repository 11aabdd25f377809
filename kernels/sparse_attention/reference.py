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
    values: Tensor | None = None  # float32 [n, head_dim] that `read` takes its rows from, if there are such


def attend(q: Tensor, keys: Tensor, mask: Tensor, sink: Tensor) -> Tensor:
    """One softmax over the given keys, which are also the values. Rows that share their keys form a group.

    Args:
        q: [.., rows, heads, d]; keys: [.., n, d]; mask: bool [.., rows, n], True = visible.
        sink: f32 [heads], a logit that only enlarges the denominator.

    Returns:
        [.., rows, heads, d] in q.dtype. Scores and sums are float32, probabilities are rounded to q.dtype for the value
        product (a no-op in float32) while the row sum is taken from the unrounded ones.
    """
    keys = keys.float()
    num_heads = q.shape[-2]
    scores = torch.matmul(q.float().flatten(-3, -2), keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.unflatten(-2, (-1, num_heads)).masked_fill(~mask.unsqueeze(-2), -torch.inf)
    sink = sink.view(-1, 1)
    top = torch.maximum(scores.amax(dim=-1, keepdim=True), sink)
    probs = torch.exp(scores - top)
    total = probs.sum(dim=-1, keepdim=True) + torch.exp(sink - top)
    values = torch.matmul(probs.to(q.dtype).float().flatten(-3, -2), keys).unflatten(-2, (-1, num_heads))
    return (values / total).to(q.dtype)


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
        mask = _join(tables) >= 0
        outputs.append(attend(q[rows].unsqueeze(1), keys, mask.unsqueeze(1), sink).squeeze(1))
    output = _join(outputs, dim=0) if outputs else torch.empty_like(q)
    return apply_rope(output, rotations, inverse=True)


def _join(parts: list[Tensor], dim: int = 1) -> Tensor:
    """torch.cat without the copy when there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
