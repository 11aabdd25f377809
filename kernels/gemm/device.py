"""One tile of a product with a weight: the device function that the kernels of all products share.

What is multiplied, and how programs that share a result add it up: triton.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from dsv4_kernels.arrival import is_last
from dsv4_kernels.quant.device import inverse_power_of_two, power_of_two, scale_exponent, store_scales


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
    out,  # from here on of `multiply_tile`
    out_exponents,
    out_scales,
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
        at = token * out_token_step + group * out_block_step
        store_scales(out_exponents, out_scales, at, exponent, token < end)
    tl.store(out + token.to(tl.int64)[None, :] * num_rows + row[:, None], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add(
    parts,
    group,
    first,  # token
    end,
    out,  # from here on of `multiply_tile`
    out_exponents,
    out_scales,
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
        _store(
            total, group, token, end, out, out_exponents, out_scales, num_rows, out_token_step, out_block_step, QUANTIZE
        )


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


@triton.jit
def multiply_tile(
    program,  # of all tiles
    split,
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
    """Multiply, and store the results where they are whole. Returns whether this program did."""
    row_tiles, token_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_tokens, TOKENS)
    # Programs that run together form a square of tiles, so that both operands come from L2.
    first = program // (8 * token_tiles) * 8
    in_square = program % (8 * token_tiles)
    square_rows = tl.minimum(row_tiles - first, 8)
    row_tile, token_tile = first + in_square % square_rows, in_square // square_rows

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
        whole = is_last(arrived + group * token_tiles + token_tile, SPLITS * (128 // ROWS))
        if whole:
            first = token_tile * TOKENS
            _add(
                parts, group, first, tl.minimum(first + TOKENS, num_tokens), out, out_exponents, out_scales,
                num_tokens, num_rows, out_token_step, out_block_step, SPLITS, QUANTIZE, ADD_TOKENS,
            )  # fmt: skip
    else:
        whole = True
        _store(
            total,
            group,
            token,
            num_tokens,
            out,
            out_exponents,
            out_scales,
            num_rows,
            out_token_step,
            out_block_step,
            QUANTIZE,
        )
    return whole
