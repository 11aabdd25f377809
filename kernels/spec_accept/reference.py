"""Acceptance of drafts in plain torch (Leviathan et al. 2023, Chen et al. 2023): rejection sampling of a chain.

A draft d that was drawn from q is accepted with probability min(1, p(d) / q(d)), p being what the main model draws
from. Behind the first one that is not accepted the token comes from what p has left, max(p - q, 0); behind the last
draft it comes from p itself. Each token then has the distribution p, whatever q is. Both functions take requests with
fewer drafts than the others (K >= 1): -1 stands where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.sampling import draw


def match_drafts(best: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy requests: a draft is accepted if it is the best token.

    Args:
        best: int64 [B, K + 1], the best token behind 0 to K drafts; not read behind those a request has.
        drafts: int64 [B, K], -1 = none; the others come first.

    Returns int64 [B] how many drafts are accepted and int64 [B] the token after them.
    """
    num_accepted = _leading(best[:, :-1] == drafts)
    return num_accepted, best.gather(1, num_accepted.unsqueeze(1)).squeeze(1)


def accept_drafts(
    target: Tensor, proposal: Tensor, drafts: Tensor, coins: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor]:
    """Sampled requests: rejection sampling.

    Args:
        target: float32 [B, K + 1, V], probabilities of the token behind 0 to K drafts; finite, also where not read.
        proposal: float32 [B, K, V], probabilities from which each draft was drawn.
        drafts: int64 [B, K], -1 = none; the others come first.
        coins: float64 [B, K] in [0, 1), which decide.
        draws: float64 [B, K + 1] in [0, 1), which draw the token behind 0 to K drafts.

    Returns int64 [B] how many drafts are accepted and int64 [B] the token after them.
    """
    is_draft = drafts >= 0
    ids = drafts.clamp_min(0).unsqueeze(2)
    wanted, offered = target[:, :-1].gather(2, ids).squeeze(2), proposal.gather(2, ids).squeeze(2)
    num_accepted = _leading(is_draft & (coins * offered < wanted))
    requests = torch.arange(len(drafts), device=drafts.device)
    rest = target[requests, num_accepted]
    # One more column, so that a request whose drafts are all accepted finds "none" there.
    was_rejected = torch.nn.functional.pad(is_draft, (0, 1))[requests, num_accepted]
    refused = proposal[requests, num_accepted.clamp_max(drafts.shape[1] - 1)]
    left = (rest - refused * was_rejected.unsqueeze(1)).clamp_min(0.0)
    # Only rounding can leave nothing: p and q are then the same.
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, rest)
    return num_accepted, draw(left, draws.gather(1, num_accepted.unsqueeze(1)).squeeze(1))


def _leading(flags: Tensor) -> Tensor:
    """How many of each row, bool [B, K], are True before the first False."""
    return flags.long().cumprod(1).sum(1)
