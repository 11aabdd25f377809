"""Named inputs of `mhc`: `mhc_pre(**case.make(seed))`. Used by tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_kernels.cases import RUNS, Run, generator, matrix, nonzero


class Case(Run):
    """The streams before one sublayer."""

    def make(self, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of `mhc_pre`; activations in `dtype`, never zero."""
        random, sizes = generator(seed), self.shapes
        streams = sizes.hc_mult
        mixes = 2 * streams + streams * streams
        return {
            "streams": nonzero(random, self.num_tokens, streams, sizes.hidden_size).to(dtype),
            "fn": matrix(random, mixes, streams * sizes.hidden_size),
            "base": nonzero(random, mixes, scale=0.5),
            "scale": (nonzero(random, 3).abs() + 0.5).repeat_interleave(
                torch.tensor([streams, streams, streams * streams])
            ),
            "sinkhorn_iters": 20,
            "hc_eps": 1e-6,
            "norm_eps": 1e-6,
        }


CASES = [Case(*run) for run in RUNS]
