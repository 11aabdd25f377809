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
