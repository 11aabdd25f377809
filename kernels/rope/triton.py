"""Rotations of a step's rows in one launch: at their positions, and at the first ones of the blocks they are in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.dependent import launches_early, wait_for_previous

BLOCK = 16  # rows of a program


@triton.jit
def _turn(angle):
    """Cosine and sine of float32 angles up to 2^21, float32: rounded once, from float64.

    A quarter turn is taken off in float64 until at most an eighth is left, and Taylor's series to the 13th power is off
    by 1e-12 there. The library's float32 functions keep a table on the stack for large angles.
    """
    x = angle.to(tl.float64)
    quarters = tl.floor(x * 0.6366197723675814 + 0.5)
    x = x - quarters * 1.5707963267948966 - quarters * 6.123233995736766e-17
    z = x * x
    sine = 1.0 / 362880 + z * (-1.0 / 39916800 + z * (1.0 / 6227020800))
    sine = x + x * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * sine)))
    cosine = 1.0 / 40320 + z * (-1.0 / 3628800 + z * (1.0 / 479001600))
    cosine = 1.0 + z * (-1.0 / 2 + z * (1.0 / 24 + z * (-1.0 / 720 + z * cosine)))
    turns = quarters.to(tl.int32) & 3
    swapped = (turns & 1) != 0
    first, second = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    first = tl.where((turns == 1) | (turns == 2), -first, first)
    second = tl.where(turns >= 2, -second, second)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _rope_tables(
    positions,  # int32 [rows]
    frequencies,  # f32 [HALF]
    tables,  # f32 [ratios, rows, HALF, 2]
    num_rows,
    RATIOS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    pair = tl.arange(0, HALF)
    position = tl.load(positions + row, mask=inside, other=0)
    frequency = tl.load(frequencies + pair)
    for index in tl.static_range(len(RATIOS)):
        first = position & -RATIOS[index]  # rounded down, below zero too
        cosine, sine = _turn(first.to(tl.float32)[:, None] * frequency[None, :])
        at = tables + ((index * num_rows + row.to(tl.int64))[:, None] * HALF + pair[None, :]) * 2
        tl.store(at, cosine, mask=inside[:, None])
        tl.store(at + 1, sine, mask=inside[:, None])


def rope_tables(positions: Tensor, frequencies: Tensor, ratios: tuple[int, ...] = (1,)) -> Tensor:
    """`rope_table` at the positions int32 [T], rounded down to multiples of each ratio: complex64 [ratios, T, D / 2].

    Args:
        frequencies: float32 [D / 2] on the same device, D / 2 a power of two.
        ratios: powers of two.

    Raises ValueError for anything else. Angles are those of the reference, their cosine and sine rounded once.
    """
    half, num_rows = len(frequencies), len(positions)
    if positions.dtype is not torch.int32 or frequencies.dtype is not torch.float32 or half & (half - 1):
        raise ValueError(
            f"rope_tables: positions are {positions.dtype}, frequencies {frequencies.dtype} [{half}]; expected int32, "
            "and float32 of a power of two"
        )
    if any(ratio < 1 or ratio & (ratio - 1) for ratio in ratios):
        raise ValueError(f"rope_tables: ratios are {ratios}; expected powers of two")
    tables = torch.empty(len(ratios), num_rows, half, dtype=torch.complex64, device=positions.device)
    if num_rows:
        _rope_tables[(triton.cdiv(num_rows, BLOCK),)](
            positions, frequencies, torch.view_as_real(tables), num_rows, RATIOS=ratios, HALF=half, BLOCK=BLOCK,
            launch_pdl=launches_early(positions.device),
        )  # fmt: skip
    return tables
