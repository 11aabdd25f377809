"""BF16 norms of a row are the same in every batch."""

from __future__ import annotations

import pytest
import torch

from dsv4_kernels.norm import head_norm, rms_norm


@pytest.mark.parametrize("num_heads", [1, 6, 8])
def test_a_rows_norm_does_not_depend_on_its_batch(num_heads: int) -> None:
    """torch's CPU code takes the root of fewer than 32 BF16 values another way, which once moved logits by 2.5."""
    q = torch.randn(40, num_heads, 128, generator=torch.Generator().manual_seed(num_heads)).bfloat16()
    weight = torch.rand(128) + 0.5
    for num_rows in (2, 3, 4, 5, 8, 33, 40):
        for row in range(num_rows):
            alone = q[row : row + 1]
            assert torch.equal(head_norm(q[:num_rows], 1e-6)[row], head_norm(alone, 1e-6)[0])
            assert torch.equal(rms_norm(q[:num_rows], weight, 1e-6)[row], rms_norm(alone, weight, 1e-6)[0])
