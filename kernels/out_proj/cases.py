"""Named inputs of `out_proj`: `grouped_out_proj(**case.make(seed))`. Used by tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_kernels.cases import RUNS, Run, generator, matrix, nonzero


class Case(Run):
    """The output projection of one layer."""

    def make(self, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of `grouped_out_proj`; activations in `dtype`, never zero."""
        random, sizes = generator(seed), self.shapes
        heads, groups, rank = sizes.num_attention_heads, sizes.o_groups, sizes.o_lora_rank
        return {
            "o": nonzero(random, self.num_tokens, heads, sizes.head_dim).to(dtype),
            "wo_a": matrix(random, groups, rank, heads // groups * sizes.head_dim),
            "wo_b": matrix(random, sizes.hidden_size, groups * rank),
        }


CASES = [Case(*run) for run in RUNS]
