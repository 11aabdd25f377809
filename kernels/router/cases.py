"""Named inputs of `router`: `route(**case.make(seed))`. Used by tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_kernels.cases import RUNS, Run, generator, matrix, nonzero


class Case(Run):
    """A score-routed layer with a bias."""

    def make(self, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of `route`; activations in `dtype`, never zero."""
        random, sizes = generator(seed), self.shapes
        return {
            "x": nonzero(random, self.num_tokens, sizes.hidden_size).to(dtype),
            "gate_weight": matrix(random, sizes.n_routed_experts, sizes.hidden_size),
            "bias": nonzero(random, sizes.n_routed_experts, scale=0.3),
            "tid2eid": None,
            "token_ids": torch.randint(0, sizes.vocab_size, (self.num_tokens,), generator=random),
            "top_k": sizes.num_experts_per_tok,
            "scale": sizes.routed_scaling_factor,
        }


CASES = [Case(*run) for run in RUNS]
