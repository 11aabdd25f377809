"""The shared expert's first product of few tokens, as programs of the router's launch.

The router of few tokens takes microseconds of latency and reads little; these programs read the weight meanwhile, which
in `gate_up` (experts.py) is a quarter of all bytes of one token. They make what its shared tiles make: hidden values of
the shared expert, quantised.

A tile has 128 gate rows and the 128 up rows that belong to them. One program would read 1.8 MB of Pro's weight for it
alone, so K is split, evenly, because the number of blocks is a constant (product.py); the last program of a tile adds
the parts in their order and goes on (ADR 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.arrival import is_last
from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows, Fp8Weight
from dsv4_kernels.mega_moe.experts import rows_of, store_shared, swiglu
from dsv4_kernels.mega_moe.product import multiply_fp8

SHARED_TOKENS = tl.constexpr(16)  # of a tile
SHARED_STAGES = tl.constexpr(3)  # 102 KB of shared memory: two programs on a multiprocessor of Hopper
ADD_TOKENS = tl.constexpr(8)  # whose parts are added at once: of 16 the loads of eight splits need 128 registers
MOST_PROGRAMS = 132  # one for each multiprocessor of an H100 keeps 9 MB on their way


def empty_hidden(num_tokens: int, width: int, device: torch.device) -> Fp8Rows:
    """The shared expert's hidden values [T, I], to be written; the exponents of a row are neighbours."""
    codes = torch.empty(num_tokens, width, dtype=torch.float8_e4m3fn, device=device)
    return Fp8Rows(codes, torch.empty(num_tokens, width // GROUP, dtype=torch.uint8, device=device))


@dataclass(frozen=True)
class SharedUp:
    """What the router's launch makes besides: `hidden` of `rows`."""

    rows: Fp8Rows  # [T, D], x as the shared expert reads it, T at most SHARED_TOKENS
    w13: Fp8Weight  # [2I, D], gate rows first
    limit: float  # of SwiGLU's clamp
    hidden: Fp8Rows  # [T, I], to be written

    @classmethod
    def build(cls, rows: Fp8Rows, w13: Fp8Weight, limit: float) -> SharedUp:
        """With memory for `hidden`. Raises ValueError for shapes that do not fit."""
        (num_tokens, depth), (num_rows, weight_depth) = rows.codes.shape, w13.codes.shape
        if depth != weight_depth or num_rows % (2 * GROUP) or num_tokens > SHARED_TOKENS.value:
            raise ValueError(
                f"SharedUp: rows are {list(rows.codes.shape)}, w13 {list(w13.codes.shape)}; expected [T, D] and "
                f"[2I, D] with T at most {SHARED_TOKENS.value} and I a multiple of {GROUP}"
            )
        return cls(rows, w13, limit, empty_hidden(num_tokens, num_rows // 2, rows.codes.device))

    @property
    def num_tiles(self) -> int:
        """Of the product, whose programs are so many for each split."""
        return len(self.w13.codes) // (2 * GROUP)

    @property
    def num_splits(self) -> int:
        """Of K: the most that divide it evenly and make no more than MOST_PROGRAMS."""
        blocks, most = self.w13.codes.shape[1] // GROUP, max(1, MOST_PROGRAMS // self.num_tiles)
        return max(splits for splits in range(1, min(blocks, most) + 1) if blocks % splits == 0)

    def arguments(self, arrived: Tensor) -> Sequence[Tensor | int | float]:
        """Of `shared_tile` from `weights` on; arrived: int32 zeros, `num_tiles` of them."""
        num_tokens, device = len(self.rows.codes), arrived.device
        parts = torch.empty(self.num_splits, num_tokens, len(self.w13.codes), dtype=torch.float32, device=device)
        return (
            self.w13.codes, self.w13.exponents, self.rows.codes, self.rows.exponents, arrived, parts,
            self.hidden.codes, self.hidden.exponents, self.hidden.codes.shape[1], self.limit,
            *self.rows.exponents.stride(),
        )  # fmt: skip


@triton.jit
def _add(
    parts, hidden, hidden_exponents, first, column, width, limit, num_tokens,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Hidden values of the tokens first .. first + ADD_TOKENS, 128 from `column` on, of the parts in their order."""
    token = first + tl.arange(0, ADD_TOKENS).to(tl.int64)
    keep = token < num_tokens
    at = parts + token[:, None] * (2 * width) + (column + tl.arange(0, 128))[None, :]
    gate, up = tl.zeros([ADD_TOKENS, 128], tl.float32), tl.zeros([ADD_TOKENS, 128], tl.float32)
    for split in tl.static_range(SPLITS):  # all loads are under way together
        gate += tl.load(at + split * num_tokens * (2 * width), mask=keep[:, None], other=0.0)
        up += tl.load(at + split * num_tokens * (2 * width) + width, mask=keep[:, None], other=0.0)
    values = swiglu(gate.to(tl.bfloat16), up.to(tl.bfloat16), limit)
    store_shared(values, hidden, hidden_exponents, token, keep, column, width)


@triton.jit
def shared_tile(
    program,  # of all tiles, for each split of K
    num_tokens,
    weights,  # e4m3 [2 * width, depth]
    exponents,
    inputs,  # e4m3 [tokens, depth]
    input_exponents,  # uint8 [tokens, depth / 128], strides exponent_row and exponent_step
    arrived,  # int32, zero: of each tile
    parts,  # f32 [SPLITS, tokens, 2 * width]
    hidden,  # e4m3 [tokens, width]
    hidden_exponents,  # uint8 [tokens, width / 128]
    width,
    limit,
    exponent_row,
    exponent_step,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,  # divides DEPTH / 128
):
    """One split of a tile of the first product; the last one of a tile makes its 128 hidden values of each token."""
    BLOCKS: tl.constexpr = DEPTH // 128 // SPLITS
    tiles = width // 128
    tile, split = program % tiles, program // tiles
    column, block = tile * 128, split * BLOCKS
    row = rows_of(column, width, 256)
    token = tl.arange(0, SHARED_TOKENS).to(tl.int64)
    acc = multiply_fp8(
        weights + block * 128, exponents + block, row, inputs + block * 128, input_exponents + block * exponent_step,
        exponent_row, exponent_step, tl.minimum(token, num_tokens - 1), DEPTH, BLOCKS, 256, SHARED_TOKENS,
        SHARED_STAGES,
    )  # fmt: skip
    at = (split * num_tokens + token)[None, :] * (2 * width) + row[:, None]
    tl.store(parts + at, acc, mask=(token < num_tokens)[None, :])
    if is_last(arrived + tile, SPLITS):
        for first in range(0, num_tokens, ADD_TOKENS):
            _add(parts, hidden, hidden_exponents, first, column, width, limit, num_tokens, SPLITS)
