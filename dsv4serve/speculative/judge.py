"""Which drafts of a step's requests stay, and the token after them: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_kernels.sampling import distribution, sample
from dsv4_kernels.spec_accept import accept_drafts, match_drafts


def pad_drafts(drafts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Drafts int64 [B, K], -1 = none, and rows int64 [B, K + 1] of the logits behind 0 to K of them.

    Request b has 1 + len(drafts[b]) neighbouring rows, request after request; beyond its last one that is repeated.
    """
    longest = max(map(len, drafts))
    padded = torch.tensor([[*each, *[-1] * (longest - len(each))] for each in drafts])
    lengths = (padded >= 0).sum(1)
    first = (lengths + 1).cumsum(0) - lengths - 1
    rows = first.unsqueeze(1) + torch.minimum(torch.arange(longest + 1), lengths.unsqueeze(1))
    return padded, rows


def judge(
    logits: Tensor,
    rows: Tensor,
    drafts: Tensor,
    proposal: Tensor,
    *,
    settings: dict[str, Tensor],
    coins: Tensor,
    draws: Tensor,
) -> tuple[Tensor, Tensor]:
    """Accept or reject.

    Args:
        logits: float32 [n, vocab] of the main model, as sampling takes them.
        rows, drafts: see `pad_drafts`.
        proposal: float32 [S, K, vocab], what the drafts of the S requests that are not greedy were drawn from.
        settings: temperature, top_k, top_p, min_p of the requests, [B] each; see dsv4_kernels.sampling.
        coins, draws: float64 [S, K] and [S, K + 1] in [0, 1); see dsv4_kernels.spec_accept.

    Returns int64 [B] how many drafts are accepted and int64 [B] the token after them. Raises NonFiniteLogits.
    """
    is_sampled = settings["temperature"] > 0
    greedy, sampled = (~is_sampled).nonzero().squeeze(1), is_sampled.nonzero().squeeze(1)
    num_accepted, tokens = torch.empty(len(drafts), dtype=torch.int64), torch.empty(len(drafts), dtype=torch.int64)
    if len(greedy):
        own = rows[greedy]
        none = torch.zeros(own.numel())
        best = sample(
            logits[own.flatten()],
            temperature=none,
            top_k=none.long(),
            top_p=none + 1,
            min_p=none,
            uniform=none.double(),
        )
        num_accepted[greedy], tokens[greedy] = match_drafts(best.view_as(own), drafts[greedy])
    if len(sampled):
        own = rows[sampled]
        repeated = {name: value[sampled].repeat_interleave(own.shape[1]) for name, value in settings.items()}
        target = distribution(logits[own.flatten()], **repeated).unflatten(0, own.shape)
        num_accepted[sampled], tokens[sampled] = accept_drafts(target, proposal, drafts[sampled], coins, draws)
    return num_accepted, tokens
