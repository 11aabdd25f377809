"""KV compression in plain torch (docs/model.md section 5): pooling, norm and RoPE of compressed entries.

Three forms of one formula: whole sequence (the oracle), C4 from a ring of raw rows, and C128 online, a running softmax
whose state is (max, sum, weighted mean) per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.norm import rms_norm
from dsv4_kernels.rope import apply_rope

# Stands for "no row yet" where -inf would turn an all-empty maximum into NaN.
LOWEST = torch.finfo(torch.float32).min


def pool(kv: Tensor, gate: Tensor) -> Tensor:
    """Softmax over rows per channel, weighted sum: kv, gate f32 [.., rows, d] -> [.., d]. Gate -inf drops a row."""
    return (torch.softmax(gate, dim=-2) * kv).sum(dim=-2)


def finish(pooled: Tensor, norm_weight: Tensor, eps: float, rotations: Tensor, dtype: torch.dtype) -> Tensor:
    """Pooled f32 [n, d] -> entry in `dtype` [n, d]: round, RMSNorm, RoPE on the last 2 * rotations.shape[-1] dims."""
    return apply_rope(rms_norm(pooled.to(dtype), norm_weight, eps), rotations)


def pool_sequence(kv: Tensor, gate: Tensor, ratio: int) -> Tensor:
    """All complete entries of whole sequences from raw rows f32 [.., T, coff * d] (ape already in gate):
    [.., T // ratio, d]."""
    num_entries = kv.shape[-2] // ratio
    kv = kv[..., : num_entries * ratio, :].unflatten(-2, (num_entries, ratio))
    gate = gate[..., : num_entries * ratio, :].unflatten(-2, (num_entries, ratio))
    if ratio != 4:
        return pool(kv, gate)
    # Overlap: an entry pools the early half of the block before it and the current half of its own block.
    dim = kv.shape[-1] // 2
    first_kv, first_gate = torch.zeros_like(kv[..., :1, :, :dim]), torch.full_like(gate[..., :1, :, :dim], -torch.inf)
    early_kv = torch.cat([first_kv, kv[..., :-1, :, :dim]], dim=-3)
    early_gate = torch.cat([first_gate, gate[..., :-1, :, :dim]], dim=-3)
    kv, gate = torch.cat([early_kv, kv[..., dim:]], dim=-2), torch.cat([early_gate, gate[..., dim:]], dim=-2)
    return pool(kv, gate)


def pool_c4(rows: Tensor, present: Tensor) -> Tensor:
    """C4 entries f32 [n, d] from raw rows f32 [n, 8, 4 * d], each kv early | kv current | gate early | gate current.

    `present` bool [n, 8] is False for rows before the sequence (the first entry has no previous block).
    """
    dim = rows.shape[-1] // 4
    kv = torch.cat([rows[:, :4, :dim], rows[:, 4:, dim : 2 * dim]], dim=1)
    gate = torch.cat([rows[:, :4, 2 * dim : 3 * dim], rows[:, 4:, 3 * dim :]], dim=1)
    return pool(kv, gate.masked_fill(~present.unsqueeze(-1), -torch.inf))


def online_update(state: Tensor, fresh: Tensor, kv: Tensor, gate: Tensor, present: Tensor) -> Tensor:
    """Advance running C128 states by one segment each.

    Args:
        state: f32 [n, 3, d]: max, sum, weighted mean so far; not read where `fresh`.
        fresh: bool [n], the segment starts its block.
        kv, gate: f32 [n, rows, d], gate with ape; `present` bool [n, rows] masks padding. At least one row is present.

    Returns:
        New state f32 [n, 3, d]. The weighted mean of a complete block is its pooled entry.
    """
    keep = fresh.view(-1, 1)
    old_max = state[:, 0].masked_fill(keep, LOWEST)
    old_sum = state[:, 1].masked_fill(keep, 0.0)
    old_mean = state[:, 2].masked_fill(keep, 0.0)
    gate = gate.masked_fill(~present.unsqueeze(-1), -torch.inf)
    new_max = torch.maximum(old_max, gate.amax(dim=1))
    weights = torch.exp(gate - new_max.unsqueeze(1))
    old_weight = old_sum * torch.exp(old_max - new_max)
    new_sum = old_weight + weights.sum(dim=1)
    new_mean = (old_mean * old_weight + (weights * kv).sum(dim=1)) / new_sum
    return torch.stack([new_max, new_sum, new_mean], dim=1)
