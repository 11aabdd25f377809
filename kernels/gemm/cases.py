"""Named inputs of `gemm`: `linear(**case.make(seed))`. Used by tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_kernels.cases import RUNS, Run, generator, matrix, nonzero


class Case(Run):
    """The first query projection."""

    def make(self, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of `linear`; activations in `dtype`, never zero."""
        random, sizes = generator(seed), self.shapes
        x = nonzero(random, self.num_tokens, sizes.hidden_size).to(dtype)
        return {"x": x, "weight": matrix(random, sizes.q_lora_rank, sizes.hidden_size)}


CASES = [Case(*run) for run in RUNS]
