"""Named inputs of `sampling`: `sample(**case.make(seed))`. Used by tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_kernels.cases import RUNS, Run, generator, nonzero


class Case(Run):
    """Rows of different temperature and filters, some of them greedy."""

    def make(self, seed: int) -> dict[str, Any]:
        """Keyword arguments of `sample`; logits are float32, never zero."""
        random, sizes = generator(seed), self.shapes
        rows = self.num_tokens
        return {
            "logits": nonzero(random, rows, sizes.vocab_size, scale=3.0),
            "temperature": torch.arange(rows) % 3 * 0.6,
            "top_k": torch.randint(0, 50, (rows,), generator=random),
            "top_p": torch.rand(rows, generator=random) * 0.2 + 0.8,
            "min_p": torch.rand(rows, generator=random) * 0.05,
            "uniform": torch.rand(rows, generator=random, dtype=torch.float64),
        }


CASES = [Case(*run) for run in RUNS]
