"""One request in chunks of any size, cut anywhere, equals the whole sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.models import oracle_logits, random_ids, small_config, small_transformer

from dsv4_kernels.metadata import StepMetadata
from dsv4serve.config import Numerics
from dsv4serve.memory import CacheLayout, CachePools
from dsv4serve.runner.paged import PagedStep
from dsv4serve.types import PAGE_TOKENS

TRANSFORMER = small_transformer(small_config(), 1)
IDS = random_ids(TRANSFORMER.config, 530, 3)
EXPECTED = oracle_logits(TRANSFORMER, IDS)


def run(cuts: list[int], num_draft_tokens: int = 0) -> torch.Tensor:
    """Logits of all rows when the sequence is computed in chunks that end at `cuts`; pages in any order."""
    pools = CachePools(CacheLayout.build(TRANSFORMER.config, Numerics.EXACT, num_draft_tokens), 3, 5, 0)
    pools.init_slot(1)
    table = np.array([[4, 0, 2]])
    rows, first = [], 0
    for end in cuts:
        metadata = StepMetadata([1], [first], [end - first], table, PAGE_TOKENS, c4_ring_rows=pools.layout.c4_ring_rows)
        streams = TRANSFORMER(torch.tensor(IDS[first:end]), PagedStep(pools, metadata))
        rows.append(TRANSFORMER.logits(streams))
        first = end
    return torch.cat(rows)


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 8, 15, 16, 17, 63, 127, 128, 129, 255, 256, 257, 511, 512, 513, 530])
def test_equal_chunks(chunk: int) -> None:
    cuts = [*range(chunk, len(IDS), chunk), len(IDS)]
    assert (run(cuts) - EXPECTED).abs().max() < 2e-4


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(6))
def test_random_cuts(seed: int) -> None:
    draw = np.random.default_rng(seed)
    cuts = [*sorted(set(draw.integers(1, len(IDS), draw.integers(1, 40)).tolist())), len(IDS)]
    assert (run(cuts) - EXPECTED).abs().max() < 2e-4


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_room_for_drafts_changes_nothing(chunk: int) -> None:
    """Longer rings (a server with MTP) hold the same window."""
    cuts = [*range(chunk, len(IDS), chunk), len(IDS)]
    assert (run(cuts, num_draft_tokens=3) - EXPECTED).abs().max() < 2e-4
