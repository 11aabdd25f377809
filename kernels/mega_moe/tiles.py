"""Which tile of the expert products holds which (token, expert) pairs: nothing read by the host.

A pair is numbered token * K + k. The pairs are sorted by expert, stable, and each expert's are cut into tiles of
`tile_tokens`. How many tiles there are is known only on the device; their number is bounded by shapes, and the tiles
beyond have expert -1.

Who fills them: of few pairs the router's last program (`fill_few`), which sorts them; of many `_fill_tiles`, a launch
of a program for each expert. One program needs for 512 pairs about 3,500 clocks (45 exchanges of a bitonic sort, 30 to
100 clocks each, a histogram, two scans), 2 us: what a launch takes before its first instruction, and `_fill_tiles`
takes as long again. The sort of 2,048 pairs would take 66 exchanges of four times the values, 5 us.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.dependent import launches_early, wait_for_previous

BLOCK = 1024  # pairs that a program looks at together
FEW_PAIRS = 512  # that one program sorts


@dataclass(frozen=True)
class Tiles:
    """int32 arrays on the device of the ids."""

    pairs: Tensor  # [T * K], sorted by expert; pairs without expert are left out, what is behind the last is undefined
    experts: Tensor  # [tiles], -1 = nothing to do
    firsts: Tensor  # [tiles], place of the tile's first pair in `pairs`
    counts: Tensor  # [tiles], 1 .. tile_tokens
    tile_tokens: int


@triton.jit
def fill_few(
    ids,  # [num_pairs], -1 = no expert
    pairs,
    experts,
    firsts,
    counts,
    num_pairs,
    num_experts,
    num_tiles,
    TILE: tl.constexpr,
    BINS: tl.constexpr,  # more than num_experts, a power of two
    SIZE: tl.constexpr,  # at least num_pairs, a power of two
):
    """All of `Tiles` by one program."""
    lane = tl.arange(0, SIZE)
    expert = tl.load(ids + lane, mask=lane < num_pairs, other=-1).to(tl.int32)
    expert = tl.where(expert < 0, num_experts, expert)
    tl.store(pairs + lane, tl.sort(expert * SIZE + lane) % SIZE, mask=lane < num_pairs)
    bins = tl.arange(0, BINS)
    count = tl.where(bins < num_experts, tl.histogram(expert, BINS), 0)
    tiles = (count + TILE - 1) // TILE
    first = tl.cumsum(count, 0) - count
    tile = tl.cumsum(tiles, 0) - tiles
    for i in range(0, tl.max(tiles, axis=0)):
        tl.store(experts + tile + i, bins, mask=i < tiles)
        tl.store(firsts + tile + i, first + i * TILE, mask=i < tiles)
        tl.store(counts + tile + i, tl.minimum(count - i * TILE, TILE), mask=i < tiles)
    tl.store(experts + lane, -1, mask=(lane >= tl.sum(tiles, axis=0)) & (lane < num_tiles))


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _fill_tiles(
    ids,  # [num_pairs], -1 = no expert
    pairs,
    experts,
    firsts,
    counts,
    num_pairs,
    num_experts,
    num_tiles,
    TILE: tl.constexpr,
    BINS: tl.constexpr,  # more than num_experts, a power of two
    SIZE: tl.constexpr,
):
    """One program for each expert. Each counts all pairs: that costs less than waiting for another launch."""
    wait_for_previous()
    expert = tl.program_id(0)
    histogram = tl.zeros([BINS], tl.int32)
    lane = tl.arange(0, SIZE)
    for start in range(0, num_pairs, SIZE):
        found = tl.load(ids + start + lane, mask=start + lane < num_pairs, other=-1).to(tl.int32)
        histogram += tl.histogram(tl.where(found < 0, num_experts, found), BINS)
    bins = tl.arange(0, BINS)
    tiles = (histogram + TILE - 1) // TILE
    first = tl.sum(tl.where(bins < expert, histogram, 0))
    count = tl.sum(tl.where(bins == expert, histogram, 0))
    tile = tl.sum(tl.where(bins < expert, tiles, 0))
    for done in range(0, count, TILE):
        tl.store(experts + tile + done // TILE, expert)
        tl.store(firsts + tile + done // TILE, first + done)
        tl.store(counts + tile + done // TILE, tl.minimum(count - done, TILE))
    if expert == num_experts - 1:
        for start in range(tile + (count + TILE - 1) // TILE, num_tiles, SIZE):
            tl.store(experts + start + lane, -1, mask=start + lane < num_tiles)
    place = first
    for start in range(0, num_pairs, SIZE):
        found = tl.load(ids + start + lane, mask=start + lane < num_pairs, other=-1).to(tl.int32)
        mine = (found == expert).to(tl.int32)
        tl.store(pairs + place + tl.cumsum(mine, 0) - 1, start + lane, mask=mine != 0)
        place += tl.sum(mine)


def max_tiles(num_pairs: int, num_experts: int, tile_tokens: int) -> int:
    """Most tiles that so many pairs can make: an expert that is hit wastes less than one."""
    hit = min(num_pairs, num_experts)
    return hit + (num_pairs - hit) // tile_tokens


def empty_tiles(num_pairs: int, num_experts: int, tile_tokens: int, device: torch.device) -> Tiles:
    """To be filled."""
    num_tiles = max_tiles(num_pairs, num_experts, tile_tokens)
    sizes = (num_pairs, num_tiles, num_tiles, num_tiles)
    return Tiles(*(torch.empty(size, dtype=torch.int32, device=device) for size in sizes), tile_tokens)


def fill_tiles(tiles: Tiles, expert_ids: Tensor, num_experts: int) -> None:
    """In a launch, from expert_ids int32 or int64 [T, K], contiguous, -1 for no expert, else below `num_experts`."""
    if expert_ids.numel():
        _fill_tiles[(num_experts,)](
            expert_ids,
            tiles.pairs,
            tiles.experts,
            tiles.firsts,
            tiles.counts,
            expert_ids.numel(),
            num_experts,
            len(tiles.experts),
            TILE=tiles.tile_tokens,
            BINS=triton.next_power_of_2(num_experts + 1),
            SIZE=BLOCK,
            launch_pdl=launches_early(expert_ids.device),
        )


def make_tiles(expert_ids: Tensor, num_experts: int, tile_tokens: int) -> Tiles:
    """Of expert_ids as `fill_tiles` takes them."""
    tiles = empty_tiles(expert_ids.numel(), num_experts, tile_tokens, expert_ids.device)
    fill_tiles(tiles, expert_ids, num_experts)
    return tiles
