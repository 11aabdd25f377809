"""The two kernels of the experts: `gate_up` with SwiGLU, and `down`.

A launch has a program for each tile of a product (product.py): some rows of one expert's weight times up to BLOCK_N
tokens, gathered by index. Which tokens an expert has is in `Tiles`. With SHARED_N the shared expert is one more expert
that all tokens have: its tiles are the first programs, because they read most.

A tile of `gate_up` holds 128 gate rows and the 128 up rows that belong to them: the group of 128 hidden values that
shares an FP8 scale is then in one program, and is rounded there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.dependent import wait_for_previous
from dsv4_kernels.mega_moe.product import multiply_fp4, multiply_fp8
from dsv4_kernels.quant.triton import store_quantized


@triton.jit
def swiglu(gate, up, limit):
    """f32 values of bf16 ones, which are clamped."""
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    gate = tl.where(gate > limit, limit, gate)  # and not minimum, which drops NaN
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _swiglu_tile(acc, limit):
    """f32 [tokens, rows / 2] of f32 [rows, tokens], gate rows first: rounded to bf16, clamped, not rounded again."""
    both = tl.reshape(acc.to(tl.bfloat16), (2, acc.shape[0] // 2, acc.shape[1]))
    gate, up = tl.split(tl.permute(both, (2, 1, 0)))
    return swiglu(gate, up, limit)


@triton.jit(do_not_specialize=["num_tokens", "exponent_step", "scale_step"])
def gate_up(
    weights,  # w13, see weights.py
    scales,
    row_scales,
    inputs,  # [tokens, ..], see product.py
    input_scales,  # strides scale_row and scale_step
    pairs,
    tile_experts,
    tile_firsts,
    tile_counts,
    routing,  # f32 [pairs]
    hidden,  # [pairs, width], in the order of `pairs`; in the form of `inputs`
    hidden_scales,
    shared_weights,  # e4m3 [2 * width, depth]
    shared_exponents,
    shared_inputs,  # e4m3 [tokens, depth]
    shared_input_exponents,  # strides exponent_row and exponent_step
    shared_hidden,  # e4m3 [tokens, width]
    shared_hidden_exponents,  # uint8 [tokens, width / 128]
    width,
    limit,
    num_tokens,
    scale_row,
    scale_step,
    exponent_row,
    exponent_step,
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    FORM: tl.constexpr,  # of the weights
    FORMAT: tl.constexpr,  # of the inputs
    ROUND: tl.constexpr,  # "bf16", "fp8", "fp4": of the hidden values
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARED_N: tl.constexpr,  # tokens of a tile of the shared expert, 0 = it is not here
    SHARED_STAGES: tl.constexpr,
):
    """SwiGLU of one tile of pairs, or of tokens for the shared expert; BLOCK_M / 2 hidden values each."""
    wait_for_previous()
    HALF: tl.constexpr = BLOCK_M // 2
    column = tl.program_id(0) * HALF
    lane = tl.arange(0, BLOCK_M)
    row = column + lane % HALF + (lane // HALF) * width
    tile = tl.program_id(1)
    if SHARED_N > 0:
        tile -= tl.cdiv(num_tokens, SHARED_N)
        if tile < 0:
            token = tl.program_id(1).to(tl.int64) * SHARED_N + tl.arange(0, SHARED_N)
            acc = multiply_fp8(
                shared_weights, shared_exponents, row, shared_inputs, shared_input_exponents, exponent_row,
                exponent_step, tl.minimum(token, num_tokens - 1), DEPTH, BLOCK_M, SHARED_N, SHARED_STAGES,
            )  # fmt: skip
            value = _swiglu_tile(acc, limit).to(tl.bfloat16).to(tl.float32)
            store_quantized(
                value, shared_hidden, shared_hidden_exponents, token, token < num_tokens, column, width,
                width // 128, 1, 128, False, True,
            )  # fmt: skip
            return
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tile_firsts + tile)
    pair_in_tile = tl.arange(0, BLOCK_N)
    keep = pair_in_tile < tl.load(tile_counts + tile)
    pair = tl.load(pairs + first + pair_in_tile, mask=keep, other=0)
    acc = multiply_fp4(
        weights + expert * width * (DEPTH // (1 if FORM == "fp4" else 4)),
        scales + expert * width * (DEPTH // 16),
        row_scales + expert * width * 2,
        row, 2 * width, inputs, input_scales, scale_row, scale_step, (pair // TOP_K).to(tl.int64), keep, DEPTH,
        FORM, FORMAT, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    value = _swiglu_tile(acc, limit) * tl.load(routing + pair, mask=keep, other=0.0)[:, None]
    value = value.to(tl.bfloat16)
    place = (first + pair_in_tile).to(tl.int64)
    if ROUND == "bf16":
        at = place[:, None] * width + (column + tl.arange(0, HALF))[None, :]
        tl.store(hidden + at, value, mask=keep[:, None])
    else:
        GROUP: tl.constexpr = 128 if ROUND == "fp8" else 32
        store_quantized(
            value.to(tl.float32), hidden, hidden_scales, place, keep, column, width, width // GROUP, 1, GROUP,
            ROUND == "fp4", FORMAT != "bf16",
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "rank_tokens"])
def down(
    weights,  # w2, see weights.py
    scales,
    row_scales,
    hidden,  # [pairs, ..], in the order of `pairs`, see product.py
    hidden_scales,
    pairs,
    tile_experts,
    tile_firsts,
    tile_counts,
    shared_weights,  # e4m3 [num_rows, depth]
    shared_exponents,
    shared_hidden,  # e4m3 [tokens, depth]
    shared_hidden_exponents,  # uint8 [tokens, depth / 128]
    parts,  # bf16 [tokens, PARTS, num_rows], or int64 [ranks], addresses of memory where each rank's parts are
    num_rows,
    num_tokens,
    scale_row,
    rank_tokens,  # of each rank in turn, if there are several
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_AT: tl.constexpr,  # offset of the parts in every rank's memory, -1 = there is one rank
    FORM: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARED_N: tl.constexpr,
    SHARED_STAGES: tl.constexpr,
):
    """The second product of one tile of pairs, or of tokens for the shared expert; BLOCK_M output dims each."""
    wait_for_previous()
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    if SHARED_N > 0:
        tile -= tl.cdiv(num_tokens, SHARED_N)
        if tile < 0:
            token = tl.program_id(1).to(tl.int64) * SHARED_N + tl.arange(0, SHARED_N)
            acc = multiply_fp8(
                shared_weights, shared_exponents, row, shared_hidden, shared_hidden_exponents, DEPTH // 128, 1,
                tl.minimum(token, num_tokens - 1), DEPTH, BLOCK_M, SHARED_N, SHARED_STAGES,
            )  # fmt: skip
            at = (token * PARTS + TOP_K)[None, :] * num_rows + row[:, None]
            tl.store(parts + at, acc.to(tl.bfloat16), mask=(token < num_tokens)[None, :])
            return
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tile_firsts + tile)
    pair_in_tile = tl.arange(0, BLOCK_N)
    keep = pair_in_tile < tl.load(tile_counts + tile)
    acc = multiply_fp4(
        weights + expert * num_rows * (DEPTH // (2 if FORM == "fp4" else 8)),
        scales + expert * num_rows * (DEPTH // 32),
        row_scales + expert * num_rows,
        row, num_rows, hidden, hidden_scales, scale_row, 1, (first + pair_in_tile).to(tl.int64), keep, DEPTH,
        FORM, FORMAT, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    pair = tl.load(pairs + first + pair_in_tile, mask=keep, other=0).to(tl.int64)
    token = pair // TOP_K
    if PARTS_AT >= 0:
        rank = token // rank_tokens
        token -= rank * rank_tokens
        home = (tl.load(parts + rank, mask=keep, other=0) + PARTS_AT).to(tl.pointer_type(tl.bfloat16))
        target = tl.multiple_of(home, 16)[None, :]
    else:
        target = parts
    part = token * PARTS + pair % TOP_K
    tl.store(target + part[None, :] * num_rows + row[:, None], acc.to(tl.bfloat16), mask=keep[None, :])
