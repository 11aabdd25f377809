"""Named inputs of `spec_accept`: `accept_drafts(**case.make(seed))`. Used by tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from dsv4_kernels.cases import RUNS, Run, generator, nonzero

NUM_DRAFTS = 3


class Case(Run):
    """Rows with 0 to NUM_DRAFTS drafts."""

    def make(self, seed: int) -> dict[str, Any]:
        """Keyword arguments of `accept_drafts`; drafts are any ids of the vocabulary."""
        random, vocab, rows = generator(seed), self.shapes.vocab_size, self.num_tokens
        drafts = torch.randint(0, vocab, (rows, NUM_DRAFTS), generator=random)
        num_drafts = torch.randint(0, NUM_DRAFTS + 1, (rows, 1), generator=random)
        return {
            "target": nonzero(random, rows, NUM_DRAFTS + 1, vocab, scale=3.0).softmax(-1),
            "proposal": nonzero(random, rows, NUM_DRAFTS, vocab, scale=3.0).softmax(-1),
            "drafts": drafts.masked_fill(torch.arange(NUM_DRAFTS) >= num_drafts, -1),
            "coins": torch.rand(rows, NUM_DRAFTS, generator=random, dtype=torch.float64),
            "draws": torch.rand(rows, NUM_DRAFTS + 1, generator=random, dtype=torch.float64),
        }


CASES = [Case(*run) for run in RUNS]
