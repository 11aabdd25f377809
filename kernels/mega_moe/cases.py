"""Named inputs of `mega_moe`: `mega_moe(**case.make(seed))`. Used by tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_kernels.cases import RUNS, Run, generator, matrix, nonzero

MAX_EXPERTS = 12


class Case(Run):
    """One layer. Pro and Flash with 12 of their experts: all of Pro's are 101 GB in float32."""

    def make(self, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of `mega_moe`; activations in `dtype`, never zero."""
        random, sizes = generator(seed), self.shapes
        hidden, width, top_k = sizes.hidden_size, sizes.moe_intermediate_size, sizes.num_experts_per_tok
        num_experts = min(sizes.n_routed_experts, MAX_EXPERTS)
        order = torch.rand(self.num_tokens, num_experts, generator=random).argsort(dim=1)
        weights = torch.rand(self.num_tokens, top_k, generator=random) + 0.1
        return {
            "x": nonzero(random, self.num_tokens, hidden).to(dtype),
            "expert_ids": order[:, :top_k].contiguous(),
            "weights": weights / weights.sum(dim=1, keepdim=True) * sizes.routed_scaling_factor,
            "w13": matrix(random, num_experts, 2 * width, hidden),
            "w2": matrix(random, num_experts, hidden, width),
            "shared_w13": matrix(random, 2 * width, hidden),
            "shared_w2": matrix(random, hidden, width),
            "limit": sizes.swiglu_limit,
        }


CASES = [Case(*run) for run in RUNS]
