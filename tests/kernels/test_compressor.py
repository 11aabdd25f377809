"""The three forms of the compressor agree with a float64 restatement of docs/model.md section 5."""

from __future__ import annotations

import pytest
import torch

from dsv4_kernels.compressor import online_update, pool_c4, pool_sequence


def raw_rows(num_rows: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width, generator=generator), 3 * torch.randn(num_rows, width, generator=generator)


def slow_entry(kv: torch.Tensor, gate: torch.Tensor, entry: int, ratio: int) -> torch.Tensor:
    """One entry, channel by channel, straight from the definition."""
    kv, gate = kv.double(), gate.double()
    dim = kv.shape[1] // (2 if ratio == 4 else 1)
    picked = []
    if ratio == 4:
        picked += [(row, 0) for row in range(4 * entry - 4, 4 * entry) if row >= 0]
        picked += [(row, dim) for row in range(4 * entry, 4 * entry + 4)]
    else:
        picked += [(row, 0) for row in range(ratio * entry, ratio * entry + ratio)]
    values = torch.stack([kv[row, offset : offset + dim] for row, offset in picked])
    gates = torch.stack([gate[row, offset : offset + dim] for row, offset in picked])
    weights = torch.exp(gates) / torch.exp(gates).sum(0)
    return (weights * values).sum(0)


@pytest.mark.parametrize(("ratio", "length"), [(4, 0), (4, 3), (4, 4), (4, 29), (128, 127), (128, 128), (128, 300)])
def test_pool_sequence_is_the_definition(ratio: int, length: int) -> None:
    width = 12 if ratio == 4 else 6
    kv, gate = raw_rows(length, width, 1)
    pooled = pool_sequence(kv, gate, ratio)
    assert pooled.shape == (length // ratio, 6)
    for entry in range(length // ratio):
        torch.testing.assert_close(pooled[entry].double(), slow_entry(kv, gate, entry, ratio), rtol=1e-5, atol=1e-6)


def test_pool_c4_reads_eight_rows_and_ignores_absent_ones() -> None:
    kv, gate = raw_rows(16, 12, 2)
    rows = torch.cat([kv, gate], dim=1)
    first = torch.cat([torch.full((4, 24), torch.nan), rows[:4]])
    first[:4] = 0.0  # what a masked read returns
    stacked = torch.stack([first, rows[0:8], rows[8:16]])
    present = torch.ones(3, 8, dtype=torch.bool)
    present[0, :4] = False
    expected = torch.stack([slow_entry(kv, gate, entry, 4) for entry in (0, 1, 3)])
    torch.testing.assert_close(pool_c4(stacked, present).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cuts", [[128], [1] * 128, [5, 60, 1, 62], [127, 1]])
def test_online_c128_equals_the_pooled_block_for_any_cuts(cuts: list[int]) -> None:
    kv, gate = raw_rows(128, 6, 3)
    state = torch.full((1, 3, 6), torch.nan)  # a recycled slot: must not be read where the block is fresh
    first = 0
    for index, cut in enumerate(cuts):
        present = torch.ones(1, cut + 2, dtype=torch.bool)
        present[0, cut:] = False
        padding = torch.full((2, 6), 9.0)
        state = online_update(
            state,
            torch.tensor([index == 0]),
            torch.cat([kv[first : first + cut], padding]).unsqueeze(0),
            torch.cat([gate[first : first + cut], padding]).unsqueeze(0),
            present,
        )
        first += cut
    torch.testing.assert_close(state[0, 2].double(), slow_entry(kv, gate, 0, 128), rtol=1e-5, atol=1e-6)


def test_online_c128_survives_gates_of_any_size() -> None:
    kv = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(4))
    gate = torch.tensor([-3e38, -200.0, 200.0, 3e38]).view(1, 4, 1).expand(1, 4, 6)
    state = online_update(torch.zeros(1, 3, 6), torch.tensor([True]), kv, gate, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(state[0, 2], kv[0, 3])


def test_zero_entries() -> None:
    assert pool_sequence(torch.empty(0, 12), torch.empty(0, 12), 4).shape == (0, 6)
    assert pool_c4(torch.empty(0, 8, 24), torch.empty(0, 8, dtype=torch.bool)).shape == (0, 6)
