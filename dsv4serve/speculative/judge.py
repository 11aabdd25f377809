"""Which drafts of a step's requests stay, and the token after them: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_kernels.sampling import distribution, sample
from dsv4_kernels.spec_accept import accept_drafts, match_drafts


def judge(
    logits: Tensor,
    rows: Tensor,
    drafts: Tensor,
    proposal: Tensor,
    *,
    sampled: Sequence[int],
    settings: dict[str, Tensor],
    coins: Tensor,
    draws: Tensor,
) -> tuple[Tensor, Tensor]:
    """Accept or reject.

    Args:
        logits: float32 [n, vocab] of the main model, as sampling takes them.
        rows: int64 [B, K + 1], the rows of the logits behind 0 to K drafts; any where a request has fewer.
        drafts: int64 [B, K], -1 = none.
        proposal: float32 [S, K, vocab], what the drafts of the `sampled` requests were drawn from.
        sampled: which requests are not greedy, S of them.
        settings: temperature, top_k, top_p, min_p of the requests, [B] each; see dsv4_kernels.sampling.
        coins, draws: float64 [S, K] and [S, K + 1] in [0, 1); see dsv4_kernels.spec_accept.

    Returns int64 [B] how many drafts are accepted and int64 [B] the token after them. Raises NonFiniteLogits.
    """
    if not sampled:
        return _match(logits, rows, drafts)
    repeated = {name: value[sampled].repeat_interleave(rows.shape[1]) for name, value in settings.items()}
    own = rows[sampled]
    target = distribution(logits[own.flatten()], **repeated).unflatten(0, own.shape)
    judged = accept_drafts(target, proposal, drafts[sampled], coins, draws)
    if len(sampled) == len(drafts):
        return judged
    greedy = sorted(set(range(len(drafts))) - set(sampled))
    num_accepted, tokens = torch.empty_like(drafts[:, 0]), torch.empty_like(drafts[:, 0])
    num_accepted[sampled], tokens[sampled] = judged
    num_accepted[greedy], tokens[greedy] = _match(logits, rows[greedy], drafts[greedy])
    return num_accepted, tokens


def _match(logits: Tensor, rows: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    none = torch.zeros(rows.numel())
    best = sample(
        logits[rows.flatten()],
        temperature=none,
        top_k=none.long(),
        top_p=none + 1,
        min_p=none,
        uniform=none.double(),
    )
    return match_drafts(best.view_as(rows), drafts)
