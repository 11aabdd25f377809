"""Muon: momentum whose update is orthogonalised, for the weight matrices (torch's own takes no stacks of matrices)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

# Newton-Schulz coefficients of K. Jordan's Muon: singular values end near 1 after five rounds.
_A, _B, _C, _ROUNDS = 3.4445, -4.7750, 2.0315, 5


def orthogonalize(updates: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of [n, rows, columns], roughly, in the input's dtype."""
    wide = updates.shape[1] <= updates.shape[2]
    x = updates.bfloat16() if wide else updates.bfloat16().transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, _B * gram + _C * (gram @ gram), x, beta=_A)
    return (x if wide else x.transpose(1, 2)).to(updates.dtype)


class Muon:
    """Optimizer of matrices [.., rows, columns].

    An update's root mean square is 0.2, as AdamW's is in practice, so both can share one learning rate (the scaling of
    arXiv 2502.16982).
    """

    def __init__(self, matrices: Sequence[Tensor], momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        self._matrices, self._momentum, self._weight_decay = list(matrices), momentum, weight_decay
        self._buffers = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update with learning rate `rate`; matrices of one shape are orthogonalised together."""
        gradients = [matrix.grad for matrix in self._matrices]
        torch._foreach_mul_(self._buffers, self._momentum)
        torch._foreach_add_(self._buffers, gradients)
        updates = torch._foreach_add(gradients, self._buffers, alpha=self._momentum)
        torch._foreach_mul_(self._matrices, 1 - rate * self._weight_decay)
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, matrix in enumerate(self._matrices):
            by_shape[tuple(matrix.shape[-2:])].append(index)
        for (rows, columns), indices in by_shape.items():
            stacks = [updates[index].reshape(-1, rows, columns) for index in indices]
            parts = orthogonalize(torch.cat(stacks)).split([len(stack) for stack in stacks])
            matrices = [self._matrices[index] for index in indices]
            shaped = [part.view_as(matrix) for part, matrix in zip(parts, matrices, strict=True)]
            torch._foreach_add_(matrices, shaped, alpha=-rate * 0.2 * max(rows, columns) ** 0.5)
