"""Sums that several programs share, by the interpreter: the last program adds them up, and leaves a zero."""

import pytest
import torch
import triton
import triton.language as tl
from support import triton_interpreter  # noqa: F401  # before any kernel

from dsv4_kernels.arrival import NUM_COUNTERS, counters, is_last, own_counters


@triton.jit
def add_rows(x, parts, out, counts, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Each program squares one row; the last one of a column of programs adds the squares."""
    part, lane = tl.program_id(0), tl.arange(0, BLOCK)
    at = tl.program_id(1) * ROWS * BLOCK + part * BLOCK + lane
    values = tl.load(x + at)
    tl.store(parts + at, values * values)
    if is_last(counts + tl.program_id(1), ROWS):
        total = tl.zeros([BLOCK], tl.float32)
        for row in range(ROWS):
            total += tl.load(parts + tl.program_id(1) * ROWS * BLOCK + row * BLOCK + lane)
        tl.store(out + tl.program_id(1) * BLOCK + lane, total)


@pytest.mark.parametrize(("results", "rows"), [(1, 1), (3, 2), (5, 7)])
def test_the_last_program_adds_the_parts_of_all_and_counts_from_zero_again(results, rows):
    for seed in range(2):
        x = torch.randn(results, rows, 32, generator=torch.Generator().manual_seed(seed))
        out = torch.full((results, 32), torch.nan)
        shared = counters(x.device, results)
        add_rows[(rows, results)](x, torch.full_like(x, torch.nan), out, shared, ROWS=rows, BLOCK=32)
        expected = torch.zeros(results, 32)
        for row in range(rows):
            expected += x[:, row].square()
        assert torch.equal(out, expected)
        assert not shared.any()


def test_too_many_results_are_refused():
    with pytest.raises(ValueError, match=f"at most {NUM_COUNTERS}"):
        counters(torch.device("cpu"), NUM_COUNTERS + 1)


def test_what_runs_beside_others_counts_apart():
    device = torch.device("cpu")
    with own_counters():
        own = counters(device, 3)
        assert counters(device, 1) is own
    assert counters(device, 3).data_ptr() != own.data_ptr()
