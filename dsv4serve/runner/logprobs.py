"""Log probabilities of sampled and of prompt tokens, from the model's own logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv4_kernels.sampling import token_logprobs
from dsv4serve.types import TokenLogprobs

BLOCK_ROWS = 64  # rows of logits that exist at a time: a whole prompt's would take gigabytes


def describe(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """One entry per row of float32 logits [B, V], of its token and its num_top best ones."""
    chosen, ids, top = token_logprobs(logits, torch.tensor(token_ids), min(num_top, logits.shape[1]))
    return [TokenLogprobs(*entry) for entry in zip(chosen.tolist(), ids.tolist(), top.tolist(), strict=True)]


def of_prompt(
    logits_of: Callable[[Tensor], Tensor], streams: Tensor, next_ids: list[int], num_top: int
) -> list[TokenLogprobs]:
    """Entries of the tokens that follow rows of streams [len(next_ids), hc_mult, hidden] in the prompt."""
    entries: list[TokenLogprobs] = []
    for first in range(0, len(next_ids), BLOCK_ROWS):
        ids = next_ids[first : first + BLOCK_ROWS]
        entries += describe(logits_of(streams[first : first + len(ids)]), ids, num_top)
    return entries
