"""The lightning indexer in plain torch (docs/model.md section 6): scores of C4 entries and top-k."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SCORE_ELEMENTS = 1 << 23  # rows are scored in blocks of at most so many [rows, heads, entries]


def index_scores(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
    """sum_h w_h relu(q_h . k): q [n, rows, heads, d], weights like q without d, k [n, entries, d]: [n, rows, entries].

    Products and sum are in q.dtype: bf16 rounds each of them as the official code does. They are multiplied as float32,
    in which a product of two bf16 is exact: for bf16 on a CPU, oneDNN keeps half a MiB of code for every new shape, and
    the number of entries is another one in each step.
    """
    num_sequences, num_rows, num_heads, _ = q.shape
    dots = torch.matmul(q.flatten(1, 2).float(), k.transpose(1, 2).float()).to(q.dtype)
    dots = dots.view(num_sequences, num_rows, num_heads, -1)
    return (torch.relu(dots) * weights.unsqueeze(-1)).sum(dim=2)


def select(scores: Tensor, num_visible: Tensor, top_k: int) -> Tensor:
    """Best entries per row: scores [n, rows, entries], num_visible int64 [n, rows] -> ids int64 [n, rows, k].

    k = min(top_k, entries); -1 fills rows that see fewer. On equal scores the lower id wins (torch.topk does not say
    which, so the id is part of the sort key). Order of the ids has no meaning.
    """
    num_entries = scores.shape[-1]
    ids = torch.arange(num_entries)
    # A float's bits are ordered like integers once the negative half is flipped.
    bits = scores.float().add(0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    hidden = ids >= num_visible.unsqueeze(-1)
    keys = ((ordered << 32) - ids).masked_fill(hidden, torch.iinfo(torch.int64).min)
    best = torch.topk(keys, min(top_k, num_entries), dim=-1, sorted=False).indices
    return best.masked_fill(best >= num_visible.unsqueeze(-1), -1)


def select_entries(q: Tensor, weights: Tensor, k: Tensor, num_visible: Tensor, top_k: int) -> Tensor:
    """`index_scores` then `select`, in row blocks. When every row sees at most top_k entries, all visible are chosen
    and nothing is scored."""
    num_entries = k.shape[1]
    if num_entries <= top_k:
        ids = torch.arange(num_entries).expand(*num_visible.shape, -1)
        return ids.masked_fill(ids >= num_visible.unsqueeze(-1), -1)
    block = max(1, MAX_SCORE_ELEMENTS // (q.shape[0] * q.shape[2] * num_entries))
    parts = [
        select(index_scores(q_rows, w_rows, k), visible, top_k)
        for q_rows, w_rows, visible in zip(
            q.split(block, 1), weights.split(block, 1), num_visible.split(block, 1), strict=True
        )
    ]
    return torch.cat(parts, dim=1)
