"""Named inputs of `rope`: `apply_rope(**case.make(seed))`. Used by tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_kernels.cases import RUNS, Run, generator, nonzero
from dsv4_kernels.rope import rope_frequencies, rope_table


class Case(Run):
    """The heads of one query."""

    def make(self, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of `apply_rope`; activations in `dtype`, never zero."""
        random, sizes = generator(seed), self.shapes
        positions = torch.randint(0, 1 << 16, (self.num_tokens,), generator=random)
        frequencies = rope_frequencies(sizes.qk_rope_head_dim, 160_000.0, (16.0, 65_536, 32.0, 1.0))
        x = nonzero(random, self.num_tokens, sizes.num_attention_heads, sizes.head_dim).to(dtype)
        return {"x": x, "rotations": rope_table(positions, frequencies)}


CASES = [Case(*run) for run in RUNS]
