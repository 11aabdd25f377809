"""Sums that thousands of programs share, on a GPU: no part is read before it is stored, whoever comes last."""

import torch
import triton
import triton.language as tl

from dsv4_kernels.arrival import counters, is_last


@triton.jit
def add_rows(x, parts, out, counts, rows, BLOCK: tl.constexpr):
    """Each program stores one row; the last one of a column of programs adds them."""
    part, lane = tl.program_id(0), tl.arange(0, BLOCK)
    first = parts + tl.program_id(1) * rows * BLOCK
    tl.store(first + part * BLOCK + lane, tl.load(x + tl.program_id(1) * rows * BLOCK + part * BLOCK + lane))
    if is_last(counts + tl.program_id(1), rows):
        total = tl.zeros([BLOCK], tl.float32)
        for row in range(rows):
            total += tl.load(first + row * BLOCK + lane)
        tl.store(out + tl.program_id(1) * BLOCK + lane, total)


def test_the_last_program_sees_all_parts_in_every_one_of_many_launches():
    results, rows, block = 300, 24, 1024
    x = torch.randint(-8, 8, (results, rows, block), device="cuda").float()  # sums are exact in any order
    shared = counters(x.device, results)
    expected = x.sum(1)
    for _ in range(200):
        parts, out = torch.full_like(x, torch.nan), torch.full_like(expected, torch.nan)
        add_rows[(rows, results)](x, parts, out, shared, rows, BLOCK=block)
        assert torch.equal(out, expected)
    assert not shared.any()
