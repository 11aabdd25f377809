"""Products with weights in Triton, for few tokens (split along K) and for many (tensor-core tiles), by one kernel.

Weight rows are the rows of a tile and tokens its columns: so 16 tokens fill a warpgroup instruction, which has 64 rows.
What is multiplied (`_product`, FORMAT):

- "fp8": E4M3 activations and weights. A Hopper tensor core adds E4M3 products with 14 bits only, so every 128 of K is a
  sum of its own, scaled and added in float32, as the official kernel does. Blackwell's applies the scales itself.
- "wide": bfloat16 activations, E4M3 weights, made bfloat16 exactly (4 bits times a power of two).
- "bf16": bfloat16 both; products are exact in float32, sums are float32.

Programs that split K store float32 parts, and so do two tiles of 64 rows that share a group of a quantised result. The
last one adds the parts in their order and stores the result (ADR 7): always the same bits.
Tiles depend on the number of tokens and the shape of the weight. In deterministic mode K is cut by the weight alone:
few tokens have a program for each split, many have all splits in one program, which adds them in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.arrival import counters
from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.deterministic import is_deterministic
from dsv4_kernels.gemm.device import multiply_tile
from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.quantize import empty_rows

TILE_ROWS = (
    128  # weight rows of a tile: the rows of one scale block, and of one group of the result when it is quantised
)
PROGRAMS = 132  # programs that a product over few tokens is split into, about: one for each multiprocessor
MIN_SPLIT_DEPTH = 512  # of K; below, partial sums cost more than they gain
MOST_SPLIT_TOKENS = 64  # with a program for each split; more make enough programs, and parts would take much memory
ADD_TOKENS = 16  # tokens whose parts are added together; more cost registers


class Tiles(NamedTuple):
    """How a product is cut up. What decides a row's bits is splits * turns, for the tensor cores add up K in one order
    whatever the tile."""

    tokens: int  # of a tile
    splits: int  # of K, each by a program of its own
    num_warps: int
    num_stages: int
    turns: int = 1  # of K too: parts that a program adds up itself


def tiles_for(num_tokens: int, num_weight_rows: int, depth: int, format_: str) -> Tiles:
    """The tiles of a product; FORMAT "fp8" needs a second set of accumulators, turns one more."""
    fp8, row_tiles = format_ == "fp8", triton.cdiv(num_weight_rows, TILE_ROWS)
    wanted = PROGRAMS // row_tiles
    if format_ == "wide":
        # A program that makes weights bfloat16 reads nothing meanwhile, so two share a multiprocessor (32 instead of
        # 42 us for one token of Pro). From 17 tokens on parts cost as much: two where there was one.
        wanted = 2 * PROGRAMS // row_tiles if num_tokens <= 16 or is_deterministic() else max(2, wanted)
    splits = max(1, min(wanted, depth // MIN_SPLIT_DEPTH))
    if num_tokens > MOST_SPLIT_TOKENS:
        if splits > 1 and is_deterministic():
            return Tiles(64, 1, 8, 4, turns=splits)
        return Tiles(128 if fp8 or num_tokens <= 128 else 256, 1, 8, 4)
    return Tiles(max(16, triton.next_power_of_2(num_tokens)), splits, 8 if num_tokens > 32 else 4, 4)


# Not compiled anew for other numbers of tokens.
@triton.jit(do_not_specialize=["num_tokens", "block_step", "out_block_step"])
def _product(
    x,  # [tokens, groups * depth]
    x_exponents,  # uint8 [tokens, depth / 128], strides token_step and block_step; with FORMAT "fp8"
    weight,  # [rows, depth]
    weight_exponents,  # uint8 [ceil(rows / 128), depth / 128]; not with FORMAT "bf16"
    arrived,  # int32, zero: of each 128 rows and tile of tokens; this and the next with ADDS
    parts,  # float32 [SPLITS, tokens, rows]
    out,  # [tokens, rows]
    out_exponents,  # uint8 [tokens, rows / 128], strides out_token_step and out_block_step; with QUANTIZE
    out_scales,  # of `store_scales`, with QUANTIZE
    num_tokens,
    num_rows,
    group_rows,  # weight rows of one group, whose input is its own `depth` columns of x
    depth,
    x_row,
    token_step,
    block_step,
    out_token_step,
    out_block_step,
    FORMAT: tl.constexpr,
    QUANTIZE: tl.constexpr,  # to E4M3, a group of 128 rows a token
    ADDS: tl.constexpr,  # several programs share 128 rows: splits, or two tiles of 64 rows
    SPLITS: tl.constexpr,
    TURNS: tl.constexpr,  # parts of a split, which one program adds
    ROWS: tl.constexpr,  # 128, or 64 with ADDS
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,  # of K in one step
    ADD_TOKENS: tl.constexpr,
):
    wait_for_previous()
    multiply_tile(
        tl.program_id(0), tl.program_id(1), x, x_exponents, weight, weight_exponents, arrived, parts, out,
        out_exponents, out_scales, num_tokens, num_rows, group_rows, depth, x_row, token_step, block_step,
        out_token_step, out_block_step, FORMAT, QUANTIZE, ADDS, SPLITS, TURNS, ROWS, TOKENS, DEPTH,
        ADD_TOKENS,
    )  # fmt: skip


def linear_fp8(
    x: Fp8Rows, weight: Fp8Weight, *, out_dtype: torch.dtype = torch.bfloat16, tiles: Tiles | None = None
) -> Tensor:
    """x [T, K] times weight [N, K] transposed -> [T, N] in `out_dtype`, bfloat16 or float32.

    Equal to `linear(x, weight, quantize=True)`, where x was quantised by `quantize_rows` or with its norm.
    """
    check_fp8(x, weight)
    out = torch.empty(x.codes.shape[0], weight.codes.shape[0], device=x.codes.device, dtype=out_dtype)
    launch("fp8", x.codes, x.exponents, weight.codes, weight.exponents, 1, out, tiles)
    return out


def linear_bf16(
    x: Tensor,
    weight: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """x bfloat16 [T, K] times weight bfloat16 [N, K] transposed -> [T, N]; products exact, sums float32.

    For what the official code computes in float32 from bfloat16 values: compressors, index weights, gate, head.
    `out`, contiguous, is written if there is one.
    """
    check_bf16(x, weight)
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0], device=x.device, dtype=out_dtype)
    launch("bf16", x, None, weight, None, 1, out, tiles)
    return out


def check_fp8(x: Fp8Rows, weight: Fp8Weight) -> None:
    """Raise ValueError for what `linear_fp8` does not take."""
    _check_depth("linear_fp8", x.codes, weight.codes.shape[1], GROUP)


def check_bf16(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError for what `linear_bf16` does not take."""
    if x.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16 or not weight.is_contiguous():
        raise ValueError(
            f"linear_bf16: x is {x.dtype}, weight {weight.dtype} with strides {weight.stride()}; expected bfloat16 and "
            "a weight that lies row by row"
        )
    _check_depth("linear_bf16", x, weight.shape[1], 64)


def _check_depth(name: str, x: Tensor, depth: int, multiple: int) -> None:
    if x.shape[1] != depth or depth % multiple or x.stride(1) != 1:
        raise ValueError(
            f"{name}: x is {list(x.shape)} with strides {x.stride()}, weight [N, K] has K = {depth}; expected the same "
            f"K, a multiple of {multiple}, and stride 1"
        )


def grouped_fp8_out(o: Tensor, weight: Fp8Weight, num_groups: int, *, tiles: Tiles | None = None) -> Fp8Rows:
    """o bfloat16 [T, G * K] by groups times weight [G * N, K] -> E4M3 rows [T, G * N] of the bfloat16 result.

    Group g multiplies its K columns of o, which are not quantised, with its N rows of the weight.
    Raises ValueError unless N is a multiple of 64 and G * N one of 128.
    """
    num_rows, depth = weight.codes.shape
    if num_rows % num_groups or num_rows // num_groups % 64 or num_rows % GROUP:
        raise ValueError(
            f"grouped_fp8_out: weight has {num_rows} rows; expected a multiple of {GROUP}, {num_groups} times one of 64"
        )
    if o.dtype is not torch.bfloat16:
        raise ValueError(f"grouped_fp8_out: o is {o.dtype}; expected torch.bfloat16")
    _check_depth("grouped_fp8_out", o, num_groups * depth, GROUP)
    out = empty_rows(o.shape[0], num_rows, o.device, scales=True)
    launch("wide", o, None, weight.codes, weight.exponents, num_groups, out, tiles)
    return out


def _depth(format_: str, tokens: int) -> int:
    """Of K in one step. Parts end with steps, so in deterministic mode it is that of the largest tile."""
    is_small = tokens <= MOST_SPLIT_TOKENS and not is_deterministic()
    return 128 if format_ == "fp8" or (format_ == "wide" and is_small) else 64


def launch(
    format_: str,
    x: Tensor,
    x_exponents: Tensor | None,
    weight: Tensor,
    weight_exponents: Tensor | None,
    num_groups: int,
    out: Tensor | Fp8Rows,
    tiles: Tiles | None,
) -> None:
    """Launch `_product` on checked tensors; `tiles` None: chosen from the shapes."""
    num_tokens, (num_rows, depth) = x.shape[0], weight.shape
    if not num_tokens:
        return
    tokens, splits, num_warps, num_stages, turns = tiles or tiles_for(num_tokens, num_rows, depth, format_)
    group_rows = num_rows // num_groups if num_groups > 1 else num_rows + TILE_ROWS
    tile_rows = TILE_ROWS if num_groups == 1 or group_rows % TILE_ROWS == 0 else TILE_ROWS // 2
    quantize = isinstance(out, Fp8Rows)
    outs = (out.codes, out.exponents, out.scales_to_write) if quantize else (out, out, out)
    adds = splits > 1 or (quantize and tile_rows < TILE_ROWS)
    token_tiles = triton.cdiv(num_tokens, tokens)
    grid = triton.cdiv(num_rows, tile_rows) * token_tiles, splits
    _product[grid](
        x,
        weight if x_exponents is None else x_exponents,
        weight,
        weight if weight_exponents is None else weight_exponents,
        counters(x.device, triton.cdiv(num_rows, TILE_ROWS) * token_tiles) if adds else outs[0],
        torch.empty(splits, num_tokens, num_rows, device=x.device, dtype=torch.float32) if adds else outs[0],
        *outs,
        num_tokens,
        num_rows,
        group_rows,
        depth,
        x.stride(0),
        *(x_exponents.stride() if x_exponents is not None else (0, 0)),
        *(out.exponents.stride() if quantize else (0, 0)),
        FORMAT=format_,
        QUANTIZE=quantize,
        ADDS=adds,
        SPLITS=splits,
        TURNS=turns,
        ROWS=tile_rows,
        TOKENS=tokens,
        DEPTH=_depth(format_, tokens),
        ADD_TOKENS=ADD_TOKENS,
        num_warps=num_warps,
        num_stages=num_stages,
        launch_pdl=launches_early(x.device),
    )
