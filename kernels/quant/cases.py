"""Named inputs of `quant`: `fake_quantize_fp8(**case.make(seed))`. Used by tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_kernels.cases import RUNS, Run, generator, nonzero


class Case(Run):
    """Activations whose groups differ in size by orders of magnitude."""

    def make(self, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of `fake_quantize_fp8`; activations in `dtype`, never zero."""
        random, sizes = generator(seed), self.shapes
        x = nonzero(random, self.num_tokens, sizes.hidden_size // 128, 128)
        x *= 10.0 ** (torch.rand(*x.shape[:2], 1, generator=random) * 8 - 4)
        return {"x": x.flatten(1).to(dtype), "group": 128}


CASES = [Case(*run) for run in RUNS]


def adversarial(group: int) -> torch.Tensor:
    """float32 [rows, group]: groups that a rounding which is nearly right gets wrong."""
    halves = torch.arange(group) / 16 - group / 32  # ties of both formats, at some scale
    alternating = torch.arange(group) % 2 == 0
    seventh = torch.arange(group) == 7
    return torch.stack([
        torch.zeros(group),
        -torch.zeros(group),
        torch.full((group,), 3.0),
        torch.full((group,), -1e-6),
        halves,
        halves * 448 / 6,
        torch.where(seventh, 3e38, 1e-3),  # one huge value
        torch.where(seventh, -3e38, -1e-38),
        torch.full((group,), 1e-40),  # subnormal
        torch.where(alternating, 1e-40, -3e-39),
        torch.full((group,), 6.0) + torch.arange(group) * 2.0**-20,
        torch.logspace(-12, 3, group),
    ])  # fmt: skip


def all_bfloat16(largest: float, group: int) -> torch.Tensor:
    """bfloat16 [rows, group]: every magnitude up to `largest`, which is in each group and decides its scale."""
    values = torch.arange(0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    kept = values[values <= largest]
    rows = torch.nn.functional.pad(kept, (0, -len(kept) % (group - 2))).view(-1, group - 2)
    return torch.cat([rows, -rows[:, :1], torch.full_like(rows[:, :1], largest)], dim=1).contiguous()
