"""Acceptance that does not come from the model, for benchmarks/speculation.py: judged as ever, then drawn by chance."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from dsv4serve.speculative import judge


def chance_of(rate: float, num_drafts: int) -> float:
    """The probability of each draft, those before it accepted, with which `rate` of all drafts are: p + p^2 + .. is
    rate x num_drafts."""
    low, high = 0.0, 1.0
    for _ in range(60):
        chance = (low + high) / 2
        if sum(chance**place for place in range(1, num_drafts + 1)) < rate * num_drafts:
            low = chance
        else:
            high = chance
    return high


class ForcedJudge:
    """`judge` of the CPU's sampler, but each draft is accepted with this chance once those before it were."""

    def __init__(self, chance: float, seed: int = 0) -> None:
        self._chance = chance
        self._draw = random.Random(seed)

    def __call__(self, logits: Tensor, rows: Tensor, drafts: Tensor, *others: Any, **settings: Any) -> Any:
        """As much work as `judge`, another result."""
        judge(logits, rows, drafts, *others, **settings)
        accepted = [self._one(count) for count in (drafts >= 0).sum(1).tolist()]
        behind = rows[range(len(accepted)), accepted]
        return torch.tensor(accepted), logits[behind].argmax(-1)

    def _one(self, num_drafts: int) -> int:
        num = 0
        while num < num_drafts and self._draw.random() < self._chance:
            num += 1
        return num


class ForcedDeviceJudge:
    """The same of `device_drafts.judge`, which runs inside a graph: so the chance is a number on the device, and the
    random numbers are new in each replay. It stands in `device_batch` before anything is captured."""

    def __init__(self, device: torch.device) -> None:
        from dsv4serve.runner import device_drafts  # Triton is not installed everywhere

        self._judge = device_drafts.judge
        self._chance = torch.zeros((), device=device)

    def set_chance(self, chance: float) -> None:
        """Of all steps that are submitted from now on."""
        self._chance.fill_(chance)

    def __call__(self, logits: Tensor, requests: Any, drafts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As much work as `judge`, and about seven small launches."""
        _, tokens, is_bad = self._judge(logits, requests, drafts)
        passes = (torch.rand(drafts.shape, device=drafts.device) < self._chance) & (drafts >= 0)
        return passes.long().cumprod(1).sum(1), tokens, is_bad
