"""The products of routed experts on Hopper, in Gluon: weights go from registers into the tensor cores.

The same sums as `gate_up` and `down` of experts.py, for tiles of 64 pairs and weights of the form "fp8": that of a
prefill, whose time is that of the tensor cores and not of memory. In one program of experts.py a weight is read,
unpacked and multiplied in turn. Here two groups of four warps multiply, each its own half of a tile's rows: a thread
unpacks packed weights into exactly the registers that the instruction reads. Each group has two products of ROWS rows
in a block of 128 inputs: weights of the second are unpacked while the first runs, and the second runs while the sum of
the first, which the unit keeps to about 14 bits, is scaled and added in float32.

A third group has packed weights and tokens copied into BUFFERS buffers of shared memory, AHEAD blocks ahead, and says
at a barrier when one is full; the others say when it is free (docs/adr/0016).

A program stays on its multiprocessor and takes one tile after the other, so that buffers for the next one are filled
while the last one is rounded and stored.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsv4_kernels.dependent import wait_for_previous
from dsv4_kernels.mega_moe.experts import swiglu
from dsv4_kernels.mega_moe.product import e4m3_words
from dsv4_kernels.quant.device import exponent_of, inverse_power_of_two, most_bits, power_of_two
from dsv4_kernels.roles import buffer_barriers, copy_ahead, meet, seen_as

ROWS = gl.constexpr(64)  # of a weight in one product
TOKENS = gl.constexpr(64)  # of a tile
BLOCK = gl.constexpr(128)  # inputs of a buffer, whose scales lie together
WORDS = gl.constexpr(16)  # int32 words of a row's packed weights in a block
BUFFERS = gl.constexpr(8)
AHEAD = gl.constexpr(3)
GROUPS = gl.constexpr(2)  # that multiply; a tile has 2 x ROWS rows for each
MULTIPLYING_REGISTERS = gl.constexpr(216)  # of a thread
FILLING_REGISTERS = gl.constexpr(80)
COUNTED = gl.constexpr(1024)  # tiles that are looked at together

SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32]))
OPERAND = gl.constexpr(gl.DotOperandLayout(0, SUMS, 4))
# Packed words [ROWS, WORDS] where their weights are in OPERAND.
PACKED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 16],
    )
)
WORDS_COPIED = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))  # 16 bytes at once, of a row all
CODES_COPIED = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
OF_TILE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # tokens
CODES_OUT = gl.constexpr(gl.BlockedLayout([16, 1], [4, 8], [1, 4], [0, 1]))  # what a row of a token has is contiguous
VALUES_OUT = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
CODES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
CODE_WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
APART = gl.constexpr(gl.SwizzledSharedLayout(4, 2, 4, [1, 0]))  # words that a warp reads are in banks of their own


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
def _start_part(number, expert_rows, scale_row, pairs, tiles, columns, LOW_ROWS: gl.constexpr, TOP_K: gl.constexpr):
    """Of a part its first row in the weight's first block; its tokens' rows, the places of their scales, how many."""
    column, expert, first, count = _part(number, tiles, columns)
    row = _row_of(first, count, pairs, TOP_K, gl.SliceLayout(1, CODES_COPIED)).to(gl.int64)
    scale_of = _row_of(first, count, pairs, TOP_K, OF_TILE) * scale_row
    return expert.to(gl.int64) * expert_rows + column * LOW_ROWS, row, scale_of, count


@gluon.jit
def _fill(
    num_mine, columns, group_rows, high_rows, num_rows, weights, scales, inputs, input_scales, scale_row, scale_step,
    pairs, tiles, buffers, BLOCKS: gl.constexpr, LOW_ROWS: gl.constexpr, TOP_K: gl.constexpr,
):  # fmt: skip
    """The group that fills buffers, with all blocks of all parts. A part's rows begin LOW_ROWS behind those of the one
    before; rows of the second group are `group_rows`, high ones `high_rows` behind the others."""
    words, steps, codes, token_scales, full, empty = buffers
    code = gl.arange(0, BLOCK // 4, layout=gl.SliceLayout(0, CODES_COPIED))[None, :]
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, CODES_COPIED))
    lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WORDS_COPIED))
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, WORDS_COPIED))[None, :]
    packed = lane[:, None] * WORDS + word
    of_both = gl.arange(0, 2 * ROWS, layout=OF_TILE)
    of_both = of_both % ROWS + of_both // ROWS * high_rows
    total = num_mine * BLOCKS
    if total > 0:
        at, row, scale_of, count = _start_part(0, num_rows * BLOCKS, scale_row, pairs, tiles, columns, LOW_ROWS, TOP_K)
        exponents = gl.load(input_scales + scale_of)
        for turn in tl.range(0, total + AHEAD, disable_licm=True):
            if turn < total:
                block, buffer = turn % BLOCKS, turn % BUFFERS
                mbarrier.wait(empty.index(buffer), (turn // BUFFERS + 1) & 1)  # at once when nobody has used it yet
                for group in gl.static_range(GROUPS):
                    first = at + (block * num_rows + group * group_rows)
                    for half in gl.static_range(2):
                        target = words.index(2 * (GROUPS * buffer + group) + half)
                        copy_ahead(target, weights + ((first + half * high_rows) * WORDS + packed))
                    copy_ahead(steps.index(GROUPS * buffer + group), scales + (first + of_both))
                of_token = row[:, None] * (BLOCKS * BLOCK // 4) + (block * (BLOCK // 4) + code)
                # What is behind the last pair is multiplied into columns that nobody reads.
                copy_ahead(codes.index(buffer), inputs + of_token, mask=(token < count)[:, None])
                token_scales.index(buffer).store(power_of_two(exponents))
            async_copy.commit_group()
            following = gl.minimum(turn + 1, total - 1)
            block = following % BLOCKS
            if block == 0:
                at, row, scale_of, count = _start_part(
                    following // BLOCKS, num_rows * BLOCKS, scale_row, pairs, tiles, columns, LOW_ROWS, TOP_K
                )
            exponents = gl.load(input_scales + scale_of + block * scale_step)
            if turn >= AHEAD:
                async_copy.wait_group(AHEAD)
                fence_async_shared()
                meet()
                mbarrier.arrive(full.index((turn - AHEAD) % BUFFERS), count=1)


@gluon.jit
def _made(buffer, words, steps, GROUP: gl.constexpr, HALF: gl.constexpr):
    """A group's low (HALF 0) or high rows in a block, over the scales of their rows: E4M3, four in an int32
    [ROWS, BLOCK / 4]."""
    place = GROUPS * buffer + GROUP
    group = gl.arange(0, WORDS, layout=gl.SliceLayout(0, PACKED)) // 4
    of_row = steps.index(place).slice(HALF * ROWS, ROWS, dim=0).load(gl.SliceLayout(1, PACKED))
    packed = words.index(2 * place + HALF).load(PACKED)
    first, second = e4m3_words(packed, (of_row[:, None] >> (8 * group)[None, :]) & 255)
    both = gl.reshape(gl.join(first, second), [ROWS, 4, 4, 2])  # [rows, group, word, half]
    return gl.reshape(gl.permute(both, [0, 1, 3, 2]), [ROWS, 2 * WORDS])


@gluon.jit
def _as_operand(made):
    """The same as E4M3 [ROWS, BLOCK], in the same registers."""
    even = gl.join(made.to(gl.uint8), (made >> 16).to(gl.uint8))
    odd = gl.join((made >> 8).to(gl.uint8), (made >> 24).to(gl.uint8))
    values = gl.reshape(gl.join(even, odd), [ROWS, BLOCK]).to(gl.float8e4nv, bitcast=True)
    return gl.convert_layout(values, OPERAND)


@gluon.jit
def _multiply(first_turn, buffers, GROUP: gl.constexpr, BLOCKS: gl.constexpr):
    """f32 [ROWS, TOKENS] of low and high rows of a group in a part whose first block is number `first_turn`."""
    words, steps, tokens, token_scales, full, empty = buffers
    zeros = gl.zeros([ROWS, TOKENS], gl.float32, layout=SUMS)
    low_sum, high_sum = zeros, zeros
    for block in tl.range(0, BLOCKS, disable_licm=True):  # constants, so that no loop may be empty
        turn = first_turn + block
        buffer = turn % BUFFERS
        mbarrier.wait(full.index(buffer), (turn // BUFFERS) & 1)
        columns = tokens.index(buffer).permute([1, 0])
        left = _made(buffer, words, steps, GROUP, 0)
        low = warpgroup_mma(_as_operand(left), columns, zeros, use_acc=False, is_async=True)
        right = _made(buffer, words, steps, GROUP, 1)
        high = warpgroup_mma(_as_operand(right), columns, zeros, use_acc=False, is_async=True)
        scale = token_scales.index(buffer).load(gl.SliceLayout(0, SUMS))[None, :]
        # What is multiplied stays in its registers until then only if it is waited for, too.
        low, left = warpgroup_mma_wait(1, deps=[low, left])
        low_sum += low * scale
        high, right = warpgroup_mma_wait(0, deps=[high, right])
        meet()
        mbarrier.arrive(empty.index(buffer), count=1)
        high_sum += high * scale
    return low_sum, high_sum


@gluon.jit
def _scaled(low, high, row_scales, high_rows):
    """Both halves times the scales of their rows; `row_scales` point to that of the first."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    low *= power_of_two(gl.load(row_scales + row))[:, None]
    return low, high * power_of_two(gl.load(row_scales + high_rows + row))[:, None]


@gluon.jit
def _hidden_values(
    num_mine, columns, width, limit, row_scales, pairs, tiles, routing, hidden, hidden_scales, buffers, maxima, met,
    GROUP: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """A group of `gate_up` that multiplies: SwiGLU of one part after the other, E4M3 with a scale per 128."""
    of_token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, SUMS))
    for number in tl.range(0, num_mine, disable_licm=True):
        column, expert, first, count = _part(number, tiles, columns)
        row = column * (GROUPS * ROWS) + GROUP * ROWS
        low, high = _multiply(number * BLOCKS, buffers, GROUP, BLOCKS)
        low, high = _scaled(low, high, row_scales + expert.to(gl.int64) * (2 * width) + row, width)
        pair = gl.load(pairs + first + of_token, mask=of_token < count, other=0)
        share = gl.load(routing + pair, mask=of_token < count, other=0.0)
        value = swiglu(low.to(gl.bfloat16), high.to(gl.bfloat16), limit) * share[None, :]
        value = value.to(gl.bfloat16).to(gl.float32)
        exponent = exponent_of(_of_both_groups(most_bits(value, 0), number, maxima, met, GROUP), False)
        codes = (value * inverse_power_of_two(exponent)[None, :]).to(gl.float8e4nv)
        codes = gl.convert_layout(codes, CODES_OUT)
        lane = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, CODES_OUT))
        at = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, CODES_OUT))[:, None]
        gl.store(hidden + (first + lane).to(gl.int64)[None, :] * width + at, codes, mask=(lane < count)[None, :])
        if GROUP == 0:
            at = (first + of_token) * (width // (GROUPS * ROWS)) + column
            gl.store(hidden_scales + at, exponent.to(gl.uint8), mask=of_token < count)


@gluon.jit
def _of_both_groups(most, number, maxima, met, GROUP: gl.constexpr):
    """int32 [TOKENS]: the larger ones of both groups' `most`.

    Neither group is two parts ahead of the other, so two places for each are enough.
    """
    place = GROUPS * (number % 2)
    maxima.index(place + GROUP).store(most)
    meet()
    mbarrier.arrive(met, count=1)
    mbarrier.wait(met, number & 1)
    return gl.maximum(most, maxima.index(place + 1 - GROUP).load(gl.SliceLayout(0, SUMS)))


@gluon.jit
def _store_parts(values, first_row, num_rows, part, keep, parts):
    """f32 [ROWS, TOKENS] as bf16 to rows first_row .. of `parts` [.., num_rows]."""
    values = gl.convert_layout(values.to(gl.bfloat16), VALUES_OUT)
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, VALUES_OUT))
    gl.store(parts[None, :] + part[None, :] * num_rows + row[:, None], values, mask=keep[None, :])


@gluon.jit
def _outputs(
    num_mine, columns, num_rows, row_scales, pairs, tiles, parts, rank_tokens, buffers,
    GROUP: gl.constexpr, BLOCKS: gl.constexpr, TOP_K: gl.constexpr, PARTS: gl.constexpr, PARTS_AT: gl.constexpr,
):  # fmt: skip
    """A group of `down` that multiplies: outputs of one part after the other, each where its token's parts are."""
    lane = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, VALUES_OUT))
    for number in tl.range(0, num_mine, disable_licm=True):
        column, expert, first, count = _part(number, tiles, columns)
        row = (GROUPS * column + GROUP) * (2 * ROWS)
        low, high = _multiply(number * BLOCKS, buffers, GROUP, BLOCKS)
        low, high = _scaled(low, high, row_scales + expert.to(gl.int64) * num_rows + row, ROWS)
        keep = lane < count
        pair = gl.load(pairs + first + lane, mask=keep, other=0).to(gl.int64)
        token = pair // TOP_K
        if PARTS_AT >= 0:
            rank = token // rank_tokens
            token -= rank * rank_tokens
            home = (gl.load(parts + rank, mask=keep, other=0) + PARTS_AT).to(gl.pointer_type(gl.bfloat16))
            target = gl.multiple_of(home, 16)
        else:
            target = parts + lane * 0
        part = token * PARTS + pair % TOP_K
        _store_parts(low, row, num_rows, part, keep, target)
        _store_parts(high, row + ROWS, num_rows, part, keep, target)


@gluon.jit
def _memory():
    """Shared memory of a program, its barriers ready, as it is read and as it is filled: packed weights, their steps,
    tokens as E4M3 or in words of four codes, their scales; barriers."""
    words = gl.allocate_shared_memory(gl.int32, [2 * GROUPS * BUFFERS, ROWS, WORDS], APART)
    steps = gl.allocate_shared_memory(gl.int32, [GROUPS * BUFFERS, 2 * ROWS], PLAIN)
    codes = gl.allocate_shared_memory(gl.int32, [BUFFERS, TOKENS, BLOCK // 4], CODE_WORDS)
    token_scales = gl.allocate_shared_memory(gl.float32, [BUFFERS, TOKENS], PLAIN)
    tokens = seen_as(codes, gl.float8e4nv, [BUFFERS, TOKENS, BLOCK], CODES)
    full, empty = buffer_barriers(BUFFERS, GROUPS)
    return (words, steps, tokens, token_scales, full, empty), (words, steps, codes, token_scales, full, empty)


@gluon.jit(do_not_specialize=["num_tiles", "scale_row", "scale_step"])
def gate_up_specialized(
    weights, scales, row_scales, inputs, input_scales, pairs, tile_experts, tile_firsts, tile_counts, routing,
    hidden, hidden_scales, width, limit, num_tiles, scale_row, scale_step,
    DEPTH: gl.constexpr, TOP_K: gl.constexpr,
):  # fmt: skip
    """As `gate_up` of experts.py without the shared expert; scales are int32, four of a row, and inputs four codes."""
    wait_for_previous()
    read, filled = _memory()
    maxima = gl.allocate_shared_memory(gl.int32, [2 * GROUPS, TOKENS], PLAIN)
    met = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(met, count=GROUPS)
    fence_async_shared()
    blocks: gl.constexpr = DEPTH // BLOCK
    columns = width // (GROUPS * ROWS)
    num_mine = _num_mine(tile_experts, num_tiles, columns)
    tiles = (tile_experts, tile_firsts, tile_counts)
    gl.warp_specialize(
        [
            (_hidden_values, (
                num_mine, columns, width, limit, row_scales, pairs, tiles, routing, hidden, hidden_scales, read, maxima,
                met, 0, blocks,
            )),
            (_hidden_values, (
                num_mine, columns, width, limit, row_scales, pairs, tiles, routing, hidden, hidden_scales, read, maxima,
                met, 1, blocks,
            )),
            (_fill, (
                num_mine, columns, ROWS, width, 2 * width, weights, scales, inputs, input_scales, scale_row, scale_step,
                pairs, tiles, filled, blocks, GROUPS * ROWS, TOP_K,
            )),
        ],
        [4, 4],
        [MULTIPLYING_REGISTERS, FILLING_REGISTERS],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_tiles", "scale_row", "rank_tokens"])
def down_specialized(
    weights, scales, row_scales, hidden, hidden_scales, pairs, tile_experts, tile_firsts, tile_counts, parts,
    num_rows, num_tiles, scale_row, rank_tokens,
    DEPTH: gl.constexpr, TOP_K: gl.constexpr, PARTS: gl.constexpr, PARTS_AT: gl.constexpr,
):  # fmt: skip
    """As `down` of experts.py without the shared expert; scales are int32, four of a row, and hidden four codes."""
    wait_for_previous()
    read, filled = _memory()
    blocks: gl.constexpr = DEPTH // BLOCK
    columns = num_rows // (2 * GROUPS * ROWS)
    num_mine = _num_mine(tile_experts, num_tiles, columns)
    tiles = (tile_experts, tile_firsts, tile_counts)
    gl.warp_specialize(
        [
            (_outputs, (
                num_mine, columns, num_rows, row_scales, pairs, tiles, parts, rank_tokens, read, 0, blocks, TOP_K,
                PARTS, PARTS_AT,
            )),
            (_outputs, (
                num_mine, columns, num_rows, row_scales, pairs, tiles, parts, rank_tokens, read, 1, blocks, TOP_K,
                PARTS, PARTS_AT,
            )),
            (_fill, (
                num_mine, columns, 2 * ROWS, ROWS, num_rows, weights, scales, hidden, hidden_scales, scale_row, 1,
                pairs, tiles, filled, blocks, 2 * GROUPS * ROWS, 0,
            )),
        ],
        [4, 4],
        [MULTIPLYING_REGISTERS, FILLING_REGISTERS],
    )  # fmt: skip
