"""Named inputs of `norm`: `rms_norm(**case.make(seed))`. Used by tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_kernels.cases import RUNS, Run, generator, nonzero


class Case(Run):
    """One norm over the hidden size."""

    def make(self, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of `rms_norm`; activations in `dtype`, never zero."""
        random, sizes = generator(seed), self.shapes
        x = nonzero(random, self.num_tokens, sizes.hidden_size, scale=3.0).to(dtype)
        return {"x": x, "weight": nonzero(random, sizes.hidden_size), "eps": 1e-6}


CASES = [Case(*run) for run in RUNS]
