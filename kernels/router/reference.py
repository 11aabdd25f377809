"""Expert routing in plain torch (docs/model.md section 8)."""

from __future__ import annotations

import torch
from torch import Tensor


def route(
    x: Tensor,
    gate_weight: Tensor,
    *,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    token_ids: Tensor,
    top_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Experts of each token and their weights: float32 [T, K] and int64 [T, K].

    Args:
        x: [T, D]; gate_weight: float32 [E, D].
        bias: float32 [E], added for the choice only, never to the weights.
        tid2eid: int64 [V, K] of a hash layer: the input token chooses, `bias` is not used.
        scale: multiplies the weights after they are normalised to sum 1.

    On equal scores the lower expert id wins.
    """
    scores = torch.nn.functional.softplus(torch.nn.functional.linear(x.float(), gate_weight)).sqrt()
    if tid2eid is not None:
        expert_ids = tid2eid[token_ids]
    else:
        biased = scores if bias is None else scores + bias
        expert_ids = torch.sort(biased, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, expert_ids)
    return weights * (scale / weights.sum(dim=-1, keepdim=True)), expert_ids
