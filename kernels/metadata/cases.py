"""Named inputs of `plan_step`: a few requests, with padding, chunks and drafts. Used by tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.cases import generator
from dsv4_kernels.metadata.plan import FLOATS, INPUTS, INTEGERS, LAST_TOKEN, TOKEN


@dataclass(frozen=True)
class Case:
    """Requests by slot, position, rows and drafts; slot -1 and no rows = padding."""

    name: str
    requests: tuple[tuple[int, int, int, int], ...]
    num_rows: int
    num_drafts: int

    def make(self, seed: int, num_slots: int = 8) -> dict[str, Tensor]:
        """Keyword arguments of `plan_step`, settings and random numbers drawn from `seed`."""
        random, num = generator(seed), len(self.requests)
        inputs = torch.zeros(len(INPUTS), num, dtype=torch.int64)
        inputs[:4] = torch.tensor(self.requests).t()
        limits = {"top_k": 3, "seed": 2**63 - 1, "index": 900, "follows": 2}
        for name, limit in limits.items():
            inputs[INPUTS.index(name)] = torch.randint(0, limit, (num,), generator=random)
        inputs[INPUTS.index("seed"), ::2] *= -1  # seeds have 64 bits
        drawn = torch.rand(len(FLOATS), num, generator=random, dtype=torch.float64)
        drawn[1:, ::2] = torch.tensor([[1.0], [0.0]], dtype=torch.float64)  # no filter
        inputs[len(INTEGERS) :] = drawn.view(torch.int64)
        token_ids = torch.randint(0, 1000, (self.num_rows,), generator=random)
        first = 0
        for _, _, count, num_drafts in self.requests:
            if count == 1 + num_drafts:
                token_ids[first : first + count] = LAST_TOKEN
            first += count
        left = torch.randint(0, 4, (2, num_slots + 1), generator=random)
        left[TOKEN] = torch.randint(0, 1000, (num_slots + 1,), generator=random)
        return {"inputs": inputs, "token_ids": token_ids, "left": left, "num_drafts": self.num_drafts}


CASES = [
    Case("one decode", ((3, 17, 1, 0),), 1, 0),
    Case("decodes and padding", ((3, 17, 1, 0), (0, 255, 1, 0), (-1, 0, 0, 0), (-1, 0, 0, 0)), 4, 0),
    Case("chunks", ((5, 0, 1300, 0), (1, 256, 3, 0), (2, 9, 1, 0), (-1, 0, 0, 0)), 3000, 0),
    Case("verifies", ((3, 17, 4, 3), (0, 1, 2, 1), (7, 255, 1, 0), (-1, 0, 0, 0)), 16, 3),
    Case("chunks and verifies", ((4, 0, 5, 0), (3, 17, 2, 1), (-1, 0, 0, 0), (-1, 0, 0, 0)), 16, 2),
    Case("padding alone", ((-1, 0, 0, 0),), 3, 2),
]
