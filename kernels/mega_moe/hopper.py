"""The products of routed experts on Hopper, in Gluon: some warps make E4M3 weights while the others multiply.

The same sums as `gate_up` and `down` of experts.py, for tiles of 64 pairs and weights of the form "fp8": that of a
prefill, whose time is that of the tensor cores and not of memory. In one program of experts.py a weight is read,
unpacked and multiplied in turn. Here two groups of four warps take turns: each reads a block of 128 inputs, packed
weights and tokens, into registers while the other unpacks its own into one of BUFFERS buffers, and says so at a
barrier. Eight warps multiply, and say when a buffer is free. They have two products of 128 rows in a block: the second
runs while the sum of the first, which the unit keeps to about 14 bits, is scaled and added in float32.

Copies ahead into shared memory in place of registers were slower, with four makers or eight (docs/adr/0014).

A program stays on its multiprocessor and takes one tile after the other, so that weights of the next one are made while
the last one is rounded and stored.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsv4_kernels.dependent import wait_for_previous
from dsv4_kernels.mega_moe.experts import swiglu
from dsv4_kernels.mega_moe.product import e4m3_words
from dsv4_kernels.quant.device import inverse_power_of_two, power_of_two, scale_exponent
from dsv4_kernels.roles import buffer_barriers, meet, seen_as

ROWS = gl.constexpr(128)  # of a weight in one product; a tile has twice as many
TOKENS = gl.constexpr(64)  # of a tile
BLOCK = gl.constexpr(128)  # inputs of a block
WORDS = gl.constexpr(16)  # int32 words of a row's packed weights in a block
BUFFERS = gl.constexpr(4)
MAKERS = gl.constexpr(2)  # groups of four warps
MAKER_REGISTERS = gl.constexpr(96)  # of a thread; the warps that multiply get 160
PIECE = gl.constexpr(32)  # rows of which a maker has packed weights in one register of each thread
PIECES = gl.constexpr(128 // 32)  # in ROWS
COUNTED = gl.constexpr(1024)  # tiles that are looked at together

SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 64, 32]))
PACKED = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))  # words of packed weights
GATHERED = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))  # words of four codes of tokens
ONE_EACH = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # tokens, of the warps that make weights
OF_TILE = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))  # of the others
CODES_OUT = gl.constexpr(gl.BlockedLayout([16, 1], [8, 4], [1, 8], [0, 1]))  # what a row of a token has is contiguous
VALUES_OUT = gl.constexpr(gl.BlockedLayout([8, 1], [16, 2], [1, 8], [0, 1]))
CODES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
CODE_WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _num_mine(tile_experts, num_tiles, columns):
    """How many parts of tiles this program computes: numbers program_id, program_id + num_programs, .."""
    lane = gl.arange(0, COUNTED, layout=OF_TILE)
    used = gl.zeros([COUNTED], gl.int32, layout=OF_TILE)
    for start in range(0, num_tiles, COUNTED):
        expert = gl.load(tile_experts + start + lane, mask=start + lane < num_tiles, other=-1)
        used += (expert >= 0).to(gl.int32)
    parts = gl.sum(used, axis=0) * columns
    return tl.cdiv(gl.maximum(parts - gl.program_id(0), 0), gl.num_programs(0))


@gluon.jit
def _part(number, tiles, columns):
    """The program's part `number`: which rows of the weight; the tile's expert, its first pair, its pairs."""
    experts, firsts, counts = tiles
    work = gl.program_id(0) + number * gl.num_programs(0)
    tile = work // columns
    return work % columns, gl.load(experts + tile), gl.load(firsts + tile), gl.load(counts + tile)


@gluon.jit
def _row_of(first, count, pairs, TOP_K: gl.constexpr, layout: gl.constexpr):
    """Of each pair of a tile its row of the inputs: the token's, or that of the pair itself with TOP_K 0. Behind the
    last pair stands the last one again."""
    place = first + gl.minimum(gl.arange(0, TOKENS, layout=layout), count - 1)
    if TOP_K > 0:
        place = gl.load(pairs + place) // TOP_K
    return place


@gluon.jit
def _make_weights(
    num_mine, columns, high_rows, num_rows, weights, scales, inputs, input_scales, scale_row, scale_step, pairs, tiles,
    made, tokens, token_scales, full, empty,
    FIRST: gl.constexpr, BLOCKS: gl.constexpr, LOW_ROWS: gl.constexpr, TOP_K: gl.constexpr,
):  # fmt: skip
    """One of the MAKERS: blocks FIRST, FIRST + MAKERS, .. of all parts. Each register gets its value of the next block
    as soon as that of this one is stored."""
    lane = gl.arange(0, PIECE, layout=gl.SliceLayout(1, PACKED))
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, PACKED))[None, :]
    packed, group = lane[:, None] * WORDS + word, word // 4
    code = gl.arange(0, BLOCK // 4, layout=gl.SliceLayout(0, GATHERED))[None, :]
    total = num_mine * BLOCKS
    if total > 0:
        block = gl.minimum(FIRST, total - 1) % BLOCKS
        at, row, scale_of = _start_part(
            gl.minimum(FIRST, total - 1) // BLOCKS, num_rows * BLOCKS, scale_row, pairs, tiles, columns, LOW_ROWS, TOP_K
        )
        words, steps = (), ()
        for piece in gl.static_range(2 * ROWS // PIECE):
            of_piece, its_steps = _read_piece(piece, at + block * num_rows, high_rows, weights, scales, packed, lane)
            words, steps = words + (of_piece,), steps + (its_steps,)  # noqa: RUF005  # Gluon has no starred
        of_token = row.to(gl.int64)[:, None] * (BLOCKS * BLOCK // 4) + (block * (BLOCK // 4) + code)
        codes, exponents = gl.load(inputs + of_token), gl.load(input_scales + scale_of + block * scale_step)
        for turn in tl.range(FIRST, total, MAKERS, disable_licm=True):
            following = gl.minimum(turn + MAKERS, total - 1)
            block = following % BLOCKS
            if block < MAKERS:
                at, row, scale_of = _start_part(
                    following // BLOCKS, num_rows * BLOCKS, scale_row, pairs, tiles, columns, LOW_ROWS, TOP_K
                )
            buffer = turn % BUFFERS
            mbarrier.wait(empty.index(buffer), (turn // BUFFERS + 1) & 1)  # at once when nobody has used it yet
            next_words, next_steps = (), ()
            for piece in gl.static_range(2 * ROWS // PIECE):
                target = made.index(buffer).slice(piece * PIECE, PIECE, dim=0)
                _store_weights(words[piece], (steps[piece][:, None] >> (8 * group)) & 255, target)
                of_piece, its_steps = _read_piece(
                    piece, at + block * num_rows, high_rows, weights, scales, packed, lane
                )
                next_words, next_steps = next_words + (of_piece,), next_steps + (its_steps,)  # noqa: RUF005
            words, steps = next_words, next_steps
            tokens.index(buffer).store(codes)
            token_scales.index(buffer).store(power_of_two(exponents))
            of_token = row.to(gl.int64)[:, None] * (BLOCKS * BLOCK // 4) + (block * (BLOCK // 4) + code)
            codes, exponents = gl.load(inputs + of_token), gl.load(input_scales + scale_of + block * scale_step)
            fence_async_shared()
            meet()
            mbarrier.arrive(full.index(buffer), count=1)


@gluon.jit
def _read_piece(piece: gl.constexpr, first_row, high_rows, weights, scales, packed, lane):
    """Packed words int32 [PIECE, WORDS] and steps int32 [PIECE] of some rows of a block whose first is `first_row`."""
    row = first_row + piece % PIECES * PIECE + piece // PIECES * high_rows
    return gl.load(weights + row * WORDS + packed), gl.load(scales + row + lane)


@gluon.jit
def _store_weights(words, steps, target):
    """Weights of packed words and their steps, int32 [PIECE, WORDS], as E4M3, four in a word."""
    first, second = e4m3_words(words, steps)
    both = gl.reshape(gl.join(first, second), [PIECE, 4, 4, 2])  # [rows, group, word, half]
    target.store(gl.reshape(gl.permute(both, [0, 1, 3, 2]), [PIECE, 2 * WORDS]))


@gluon.jit
def _start_part(number, expert_rows, scale_row, pairs, tiles, columns, LOW_ROWS: gl.constexpr, TOP_K: gl.constexpr):
    """Of a part its first row in the weight's first block, and the tokens' rows and the places of their scales."""
    column, expert, first, count = _part(number, tiles, columns)
    row = _row_of(first, count, pairs, TOP_K, gl.SliceLayout(1, GATHERED))
    scale_of = _row_of(first, count, pairs, TOP_K, ONE_EACH) * scale_row
    return expert.to(gl.int64) * expert_rows + column * LOW_ROWS, row, scale_of


@gluon.jit
def _multiply(first_turn, made, tokens, token_scales, full, empty, BLOCKS: gl.constexpr):
    """f32 [ROWS, TOKENS] of both halves of a part's rows, whose first block is number `first_turn`."""
    zeros = gl.zeros([ROWS, TOKENS], gl.float32, layout=SUMS)
    low_sum, high_sum = zeros, zeros
    for block in tl.range(0, BLOCKS, disable_licm=True):  # constants, so that no loop may be empty
        turn = first_turn + block
        buffer = turn % BUFFERS
        mbarrier.wait(full.index(buffer), (turn // BUFFERS) & 1)
        columns = tokens.index(buffer).permute([1, 0])
        rows = made.index(buffer)
        low = warpgroup_mma(rows.slice(0, ROWS, dim=0), columns, zeros, use_acc=False, is_async=True)
        high = warpgroup_mma(rows.slice(ROWS, ROWS, dim=0), columns, zeros, use_acc=False, is_async=True)
        scale = token_scales.index(buffer).load(gl.SliceLayout(0, SUMS))[None, :]
        # All warps are through with the block before when they have begun this one: they meet while it is multiplied.
        meet()
        mbarrier.arrive(empty.index((turn + BUFFERS - 1) % BUFFERS), count=1, pred=block > 0)
        low_sum += warpgroup_mma_wait(1, deps=[low]) * scale
        high_sum += warpgroup_mma_wait(0, deps=[high]) * scale
    meet()
    mbarrier.arrive(empty.index((first_turn + BLOCKS - 1) % BUFFERS), count=1)
    return low_sum, high_sum


@gluon.jit
def _scaled(low, high, row_scales, high_rows):
    """Both halves times the scales of their rows; `row_scales` point to that of the first."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    low *= power_of_two(gl.load(row_scales + row))[:, None]
    return low, high * power_of_two(gl.load(row_scales + high_rows + row))[:, None]


@gluon.jit
def _hidden_values(
    num_mine, columns, width, limit, row_scales, pairs, tiles, routing, hidden, hidden_scales,
    made, tokens, token_scales, full, empty, BLOCKS: gl.constexpr,
):  # fmt: skip
    """The other warps of `gate_up`: SwiGLU of one part after the other, E4M3 with a scale per 128."""
    lane = gl.arange(0, TOKENS, layout=OF_TILE)
    for number in tl.range(0, num_mine, disable_licm=True):
        column, expert, first, count = _part(number, tiles, columns)
        pair = gl.load(pairs + first + lane, mask=lane < count, other=0)
        share = gl.load(routing + pair, mask=lane < count, other=0.0)
        low, high = _multiply(number * BLOCKS, made, tokens, token_scales, full, empty, BLOCKS)
        low, high = _scaled(low, high, row_scales + expert.to(gl.int64) * (2 * width) + column * ROWS, width)
        value = swiglu(low.to(gl.bfloat16), high.to(gl.bfloat16), limit)
        value = value * gl.convert_layout(share, gl.SliceLayout(0, SUMS))[None, :]
        value = value.to(gl.bfloat16).to(gl.float32)
        exponent = scale_exponent(value, 0, False)
        codes = (value * inverse_power_of_two(exponent)[None, :]).to(gl.float8e4nv)
        codes = gl.convert_layout(codes, CODES_OUT)
        place = (first + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, CODES_OUT))).to(gl.int64)[None, :] * width
        at = column * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, CODES_OUT))[:, None]
        keep = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, CODES_OUT)) < count
        gl.store(hidden + place + at, codes, mask=keep[None, :])
        of_token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, SUMS))
        at = (first + of_token) * (width // ROWS) + column
        gl.store(hidden_scales + at, exponent.to(gl.uint8), mask=of_token < count)


@gluon.jit
def _store_parts(values, first_row, num_rows, part, keep, parts):
    """f32 [ROWS, TOKENS] as bf16 to rows first_row .. of `parts` [.., num_rows]."""
    values = gl.convert_layout(values.to(gl.bfloat16), VALUES_OUT)
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, VALUES_OUT))
    gl.store(parts[None, :] + part[None, :] * num_rows + row[:, None], values, mask=keep[None, :])


@gluon.jit
def _outputs(
    num_mine, columns, num_rows, row_scales, pairs, tiles, parts, rank_tokens,
    made, tokens, token_scales, full, empty,
    BLOCKS: gl.constexpr, TOP_K: gl.constexpr, PARTS: gl.constexpr, PARTS_AT: gl.constexpr,
):  # fmt: skip
    """The other warps of `down`: outputs of one part after the other, each where its token's parts are."""
    lane = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, VALUES_OUT))
    for number in tl.range(0, num_mine, disable_licm=True):
        column, expert, first, count = _part(number, tiles, columns)
        keep = lane < count
        pair = gl.load(pairs + first + lane, mask=keep, other=0).to(gl.int64)
        low, high = _multiply(number * BLOCKS, made, tokens, token_scales, full, empty, BLOCKS)
        low, high = _scaled(low, high, row_scales + expert.to(gl.int64) * num_rows + column * (2 * ROWS), ROWS)
        token = pair // TOP_K
        if PARTS_AT >= 0:
            rank = token // rank_tokens
            token -= rank * rank_tokens
            home = (gl.load(parts + rank, mask=keep, other=0) + PARTS_AT).to(gl.pointer_type(gl.bfloat16))
            target = gl.multiple_of(home, 16)
        else:
            target = parts + lane * 0
        part = token * PARTS + pair % TOP_K
        _store_parts(low, column * (2 * ROWS), num_rows, part, keep, target)
        _store_parts(high, column * (2 * ROWS) + ROWS, num_rows, part, keep, target)


@gluon.jit
def _memory():
    """Shared memory of a program, its barriers ready: weights and tokens in words of four codes, and so on."""
    made = gl.allocate_shared_memory(gl.int32, [BUFFERS, 2 * ROWS, BLOCK // 4], CODE_WORDS)
    tokens = gl.allocate_shared_memory(gl.int32, [BUFFERS, TOKENS, BLOCK // 4], CODE_WORDS)
    token_scales = gl.allocate_shared_memory(gl.float32, [BUFFERS, TOKENS], PLAIN)
    full, empty = buffer_barriers(BUFFERS)
    return made, tokens, token_scales, full, empty


@gluon.jit
def _as_operands(made, tokens):
    """Both as E4M3."""
    rows = seen_as(made, gl.float8e4nv, [BUFFERS, 2 * ROWS, BLOCK], CODES)
    return rows, seen_as(tokens, gl.float8e4nv, [BUFFERS, TOKENS, BLOCK], CODES)


@gluon.jit(do_not_specialize=["num_tiles", "scale_row", "scale_step"])
def gate_up_specialized(
    weights, scales, row_scales, inputs, input_scales, pairs, tile_experts, tile_firsts, tile_counts, routing,
    hidden, hidden_scales, width, limit, num_tiles, scale_row, scale_step,
    DEPTH: gl.constexpr, TOP_K: gl.constexpr,
):  # fmt: skip
    """As `gate_up` of experts.py without the shared expert; scales are int32, four of a row, and inputs four codes."""
    wait_for_previous()
    made, tokens, token_scales, full, empty = _memory()
    rows, values = _as_operands(made, tokens)
    blocks: gl.constexpr = DEPTH // BLOCK
    columns = width // ROWS
    num_mine = _num_mine(tile_experts, num_tiles, columns)
    tiles = (tile_experts, tile_firsts, tile_counts)
    gl.warp_specialize(
        [
            (_hidden_values, (
                num_mine, columns, width, limit, row_scales, pairs, tiles, routing, hidden, hidden_scales,
                rows, values, token_scales, full, empty, blocks,
            )),
            (_make_weights, (
                num_mine, columns, width, 2 * width, weights, scales, inputs, input_scales, scale_row, scale_step,
                pairs, tiles, made, tokens, token_scales, full, empty, 0, blocks, ROWS, TOP_K,
            )),
            (_make_weights, (
                num_mine, columns, width, 2 * width, weights, scales, inputs, input_scales, scale_row, scale_step,
                pairs, tiles, made, tokens, token_scales, full, empty, 1, blocks, ROWS, TOP_K,
            )),
        ],
        [4, 4],
        [MAKER_REGISTERS, MAKER_REGISTERS],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_tiles", "scale_row", "rank_tokens"])
def down_specialized(
    weights, scales, row_scales, hidden, hidden_scales, pairs, tile_experts, tile_firsts, tile_counts, parts,
    num_rows, num_tiles, scale_row, rank_tokens,
    DEPTH: gl.constexpr, TOP_K: gl.constexpr, PARTS: gl.constexpr, PARTS_AT: gl.constexpr,
):  # fmt: skip
    """As `down` of experts.py without the shared expert; scales are int32, four of a row, and hidden four codes."""
    wait_for_previous()
    made, tokens, token_scales, full, empty = _memory()
    rows, values = _as_operands(made, tokens)
    blocks: gl.constexpr = DEPTH // BLOCK
    columns = num_rows // (2 * ROWS)
    num_mine = _num_mine(tile_experts, num_tiles, columns)
    tiles = (tile_experts, tile_firsts, tile_counts)
    gl.warp_specialize(
        [
            (_outputs, (
                num_mine, columns, num_rows, row_scales, pairs, tiles, parts, rank_tokens,
                rows, values, token_scales, full, empty, blocks, TOP_K, PARTS, PARTS_AT,
            )),
            (_make_weights, (
                num_mine, columns, ROWS, num_rows, weights, scales, hidden, hidden_scales, scale_row, 1,
                pairs, tiles, made, tokens, token_scales, full, empty, 0, blocks, 2 * ROWS, 0,
            )),
            (_make_weights, (
                num_mine, columns, ROWS, num_rows, weights, scales, hidden, hidden_scales, scale_row, 1,
                pairs, tiles, made, tokens, token_scales, full, empty, 1, blocks, 2 * ROWS, 0,
            )),
        ],
        [4, 4],
        [MAKER_REGISTERS, MAKER_REGISTERS],
    )  # fmt: skip
