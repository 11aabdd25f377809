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
from triton.language.target_info import cuda_capability_geq

from dsv4_kernels.arrival import counters, is_last
from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.deterministic import is_deterministic
from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.quantize import empty_rows
from dsv4_kernels.quant.device import inverse_power_of_two, power_of_two, scale_exponent

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


def tiles_for(num_tokens: int, num_weight_rows: int, depth: int, fp8: bool) -> Tiles:
    """The tiles of a product; FORMAT "fp8" needs a second set of accumulators, turns one more."""
    wanted = PROGRAMS // triton.cdiv(num_weight_rows, TILE_ROWS)
    splits = max(1, min(wanted, depth // MIN_SPLIT_DEPTH))
    if num_tokens > MOST_SPLIT_TOKENS:
        if splits > 1 and is_deterministic():
            return Tiles(64, 1, 8, 4, turns=splits)
        return Tiles(128 if fp8 or num_tokens <= 128 else 256, 1, 8, 4)
    return Tiles(max(16, triton.next_power_of_2(num_tokens)), splits, 8 if num_tokens > 32 else 4, 4)


@triton.jit
def _scales(scales_at, exponents_at, block, block_step):
    """Scale of a block of the weight times those of the tokens, float32 [TOKENS]."""
    return power_of_two(tl.load(scales_at + block)) * power_of_two(tl.load(exponents_at + block * block_step))


@triton.jit
def _store(
    total,  # float32 [128, tokens of a tile]
    group,  # of 128 weight rows
    token,
    end,  # of the tokens
    out,  # from here on of `_product`
    out_exponents,
    num_rows,
    out_token_step,
    out_block_step,
    QUANTIZE: tl.constexpr,
):
    """Store sums as results."""
    row = group * 128 + tl.arange(0, 128)
    inside = (token < end)[None, :] & (row < num_rows)[:, None]
    if QUANTIZE:
        total = total.to(tl.bfloat16).to(tl.float32)
        exponent = scale_exponent(total, 0, FP4=False)
        total = total * inverse_power_of_two(exponent)[None, :]
        exponent_at = out_exponents + token * out_token_step + group * out_block_step
        tl.store(exponent_at, exponent.to(tl.uint8), mask=token < end)
    tl.store(out + token.to(tl.int64)[None, :] * num_rows + row[:, None], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add(
    parts,
    group,
    first,  # token
    end,
    out,  # from here on of `_product`
    out_exponents,
    num_tokens,
    num_rows,
    out_token_step,
    out_block_step,
    SPLITS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ADD_TOKENS: tl.constexpr,
):
    """Add the parts of 128 rows and the tokens first .. end, in their order, and store the sums as results."""
    row = group * 128 + tl.arange(0, 128)
    for start in range(first, end, ADD_TOKENS):
        token = start + tl.arange(0, ADD_TOKENS)
        inside = (token < end)[None, :] & (row < num_rows)[:, None]
        at = parts + token.to(tl.int64)[None, :] * num_rows + row[:, None]
        total = tl.zeros([128, ADD_TOKENS], tl.float32)
        for split in tl.static_range(SPLITS):  # all loads are under way together
            total += tl.load(at + split * num_tokens.to(tl.int64) * num_rows, mask=inside, other=0.0)
        _store(total, group, token, end, out, out_exponents, num_rows, out_token_step, out_block_step, QUANTIZE)


@triton.jit
def _sum(
    x_at,  # pointers [TOKENS] to the tokens' inputs
    exponents_at,  # pointers [TOKENS], with FORMAT "fp8"
    weight_at,  # pointers [ROWS]
    scales_at,
    start,  # blocks of K
    end,
    blocks,
    block_step,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """float32 [ROWS, TOKENS]: products over the blocks start .. end of K."""
    k = tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    if FORMAT == "fp8":
        scales = _scales(scales_at, exponents_at, tl.minimum(start, blocks - 1), block_step)
    for block in range(start, end):
        weights = tl.load(weight_at[:, None] + (block * DEPTH + k)[None, :])
        values = tl.load(x_at[:, None] + (block * DEPTH + k)[None, :])
        if FORMAT == "bf16":
            total = tl.dot(weights, tl.trans(values), total)
        elif FORMAT == "wide":
            scale = power_of_two(tl.load(scales_at + block * DEPTH // 128))
            total = tl.dot((weights.to(tl.float32) * scale).to(tl.bfloat16), tl.trans(values), total)
        elif cuda_capability_geq(10):
            weight_scale = tl.load(scales_at + block + tl.zeros([ROWS, DEPTH // 32], tl.int32))
            exponent = tl.load(exponents_at + block * block_step)
            x_scale = tl.broadcast_to(exponent[:, None], [TOKENS, DEPTH // 32])
            total = tl.dot_scaled(weights, weight_scale, "e4m3", tl.trans(values), x_scale, "e4m3", total)
        else:
            # Bytes are not copied ahead by the pipeline: the next scales are on their way while this block multiplies.
            following = _scales(scales_at, exponents_at, tl.minimum(block + 1, blocks - 1), block_step)
            total += tl.dot(weights, tl.trans(values)) * scales[None, :]
            scales = following
    return total


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
    row_tiles, token_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_tokens, TOKENS)
    # Programs that run together form a square of tiles, so that both operands come from L2.
    first = tl.program_id(0) // (8 * token_tiles) * 8
    in_square = tl.program_id(0) % (8 * token_tiles)
    square_rows = tl.minimum(row_tiles - first, 8)
    row_tile, token_tile = first + in_square % square_rows, in_square // square_rows
    split = tl.program_id(1)

    row = row_tile * ROWS + tl.arange(0, ROWS)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    # Rows beyond the end repeat the last one: a load without a mask, and what they give is not stored.
    weight_at = weight + tl.minimum(row, num_rows - 1).to(tl.int64) * depth
    x_token = tl.minimum(token, num_tokens - 1).to(tl.int64)
    x_at = x + x_token * x_row + row_tile * ROWS // group_rows * depth
    exponents_at = x_exponents + x_token * token_step
    scales_at = weight_exponents + row_tile * ROWS // 128 * (depth // 128)
    blocks = depth // DEPTH
    per_part = tl.cdiv(blocks, SPLITS * TURNS)
    start = split * TURNS * per_part
    total = _sum(
        x_at, exponents_at, weight_at, scales_at, start, tl.minimum(start + per_part, blocks), blocks, block_step,
        FORMAT, ROWS, TOKENS, DEPTH,
    )  # fmt: skip
    if TURNS > 1:
        total += 0.0  # as `_add` begins
        for turn in range(1, TURNS):
            start = (split * TURNS + turn) * per_part
            total += _sum(
                x_at, exponents_at, weight_at, scales_at, start, tl.minimum(start + per_part, blocks), blocks,
                block_step, FORMAT, ROWS, TOKENS, DEPTH,
            )  # fmt: skip

    group = row_tile * ROWS // 128
    if ADDS:
        at = (split * num_tokens + token).to(tl.int64)[None, :] * num_rows + row[:, None]
        tl.store(parts + at, total, mask=(token < num_tokens)[None, :] & (row < num_rows)[:, None])
        if is_last(arrived + group * token_tiles + token_tile, SPLITS * (128 // ROWS)):
            first = token_tile * TOKENS
            _add(
                parts, group, first, tl.minimum(first + TOKENS, num_tokens), out, out_exponents, num_tokens, num_rows,
                out_token_step, out_block_step, SPLITS, QUANTIZE, ADD_TOKENS,
            )  # fmt: skip
    else:
        _store(total, group, token, num_tokens, out, out_exponents, num_rows, out_token_step, out_block_step, QUANTIZE)


def linear_fp8(
    x: Fp8Rows, weight: Fp8Weight, *, out_dtype: torch.dtype = torch.bfloat16, tiles: Tiles | None = None
) -> Tensor:
    """x [T, K] times weight [N, K] transposed -> [T, N] in `out_dtype`, bfloat16 or float32.

    Equal to `linear(x, weight, quantize=True)`, where x was quantised by `quantize_rows` or with its norm.
    """
    _check_depth("linear_fp8", x.codes, weight.codes.shape[1], GROUP)
    out = torch.empty(x.codes.shape[0], weight.codes.shape[0], device=x.codes.device, dtype=out_dtype)
    launch("fp8", x.codes, x.exponents, weight.codes, weight.exponents, 1, out, None, tiles)
    return out


def linear_bf16(
    x: Tensor, weight: Tensor, *, out_dtype: torch.dtype = torch.float32, tiles: Tiles | None = None
) -> Tensor:
    """x bfloat16 [T, K] times weight bfloat16 [N, K] transposed -> [T, N]; products exact, sums float32.

    For what the official code computes in float32 from bfloat16 values: compressors, index weights, gate, head.
    """
    if x.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16 or not weight.is_contiguous():
        raise ValueError(
            f"linear_bf16: x is {x.dtype}, weight {weight.dtype} with strides {weight.stride()}; expected bfloat16 and "
            "a weight that lies row by row"
        )
    _check_depth("linear_bf16", x, weight.shape[1], 64)
    out = torch.empty(x.shape[0], weight.shape[0], device=x.device, dtype=out_dtype)
    launch("bf16", x, None, weight, None, 1, out, None, tiles)
    return out


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
    out = empty_rows(o.shape[0], num_rows, o.device)
    launch("wide", o, None, weight.codes, weight.exponents, num_groups, out.codes, out.exponents, tiles)
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
    out: Tensor,
    out_exponents: Tensor | None,
    tiles: Tiles | None,
) -> None:
    """Launch `_product` on checked tensors; `tiles` None: chosen from the shapes."""
    num_tokens, (num_rows, depth) = x.shape[0], weight.shape
    if not num_tokens:
        return
    tokens, splits, num_warps, num_stages, turns = tiles or tiles_for(num_tokens, num_rows, depth, format_ == "fp8")
    group_rows = num_rows // num_groups if num_groups > 1 else num_rows + TILE_ROWS
    tile_rows = TILE_ROWS if num_groups == 1 or group_rows % TILE_ROWS == 0 else TILE_ROWS // 2
    quantize = out_exponents is not None
    adds = splits > 1 or (quantize and tile_rows < TILE_ROWS)
    token_tiles = triton.cdiv(num_tokens, tokens)
    grid = triton.cdiv(num_rows, tile_rows) * token_tiles, splits
    _product[grid](
        x,
        weight if x_exponents is None else x_exponents,
        weight,
        weight if weight_exponents is None else weight_exponents,
        counters(x.device, triton.cdiv(num_rows, TILE_ROWS) * token_tiles) if adds else out,
        torch.empty(splits, num_tokens, num_rows, device=x.device, dtype=torch.float32) if adds else out,
        out,
        out if out_exponents is None else out_exponents,
        num_tokens,
        num_rows,
        group_rows,
        depth,
        x.stride(0),
        *(x_exponents.stride() if x_exponents is not None else (0, 0)),
        *(out_exponents.stride() if out_exponents is not None else (0, 0)),
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
