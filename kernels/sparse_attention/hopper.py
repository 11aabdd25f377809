"""The kernel of sparse attention on Hopper, in Gluon: some warps make keys while the others multiply.

The same operation, blocks and order of keys as `_attend` of triton.py, for heads in tiles of 64. Four warps read stored
rows one block ahead, dequantise them into one of two buffers, and say so at a barrier; eight warps multiply, and say
when a buffer is free. Triton cannot say this, and it multiplies queries by keys twice: of two products behind each
other it gives the first one's rows to all warps, and 64 rows of heads are the rows of only four.

A program stays on its multiprocessor and takes one tile, 64 heads of a row and a split of its keys, after the other:
the readers begin the next one while the others still multiply and store the last.

Numbers of registers and bytes fit by a hair (tests/kernels/test_compile_gate.py).
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
from dsv4_kernels.quant.device import power_of_two
from dsv4_kernels.roles import buffer_barriers, copy_ahead, meet, seen_as
from dsv4_kernels.sparse_attention.device import key_blocks

HEADS = gl.constexpr(64)  # of a program: the rows of a wgmma tile
KEYS = gl.constexpr(64)  # of a block
GROUP = gl.constexpr(64)  # dims under one scale; the last group of a row has bf16 values and none
BUFFERS = gl.constexpr(2)
LINE = gl.constexpr(128)  # bytes of a cache line
READERS = gl.constexpr(4)  # warps that make keys
READER_REGISTERS = gl.constexpr(128)  # of a thread; the warps that multiply get 184

SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 256, 16]))
READ = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))  # words of stored rows
LINES = gl.constexpr(gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0]))  # of stored rows
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))  # queries and outputs
TURN = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))  # the rotated dims
ROWS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))

# Four e4m3 codes of a word, times a factor, as two words of two bf16 each. Elements of one byte would take a register
# each while they wait for the next turn of the loop.
WIDEN = gl.constexpr("""
{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 ab, cd;
    .reg .f32 fa, fb, fc, fd;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 ab, low;
    cvt.rn.f16x2.e4m3x2 cd, high;
    mov.b32 {a, b}, ab;
    mov.b32 {c, d}, cd;
    cvt.f32.f16 fa, a;
    cvt.f32.f16 fb, b;
    cvt.f32.f16 fc, c;
    cvt.f32.f16 fd, d;
    mul.f32 fa, fa, $3;
    mul.f32 fb, fb, $3;
    mul.f32 fc, fc, $3;
    mul.f32 fd, fd, $3;
    cvt.rn.bf16x2.f32 $0, fb, fa;
    cvt.rn.bf16x2.f32 $1, fd, fc;
}
""")


# A line of memory into the cache that all multiprocessors share, whoever reads it then.
FETCH = gl.constexpr("prefetch.global.L2 [$1]; mov.b32 $0, 0;")


@gluon.jit
def _tile(number, positions, num_chosen, num_tiles, num_splits, NUM_HEADS: gl.constexpr, RATIO: gl.constexpr,
          CHOSEN: gl.constexpr, WINDOW: gl.constexpr):  # fmt: skip
    """Row, its position, first head, split and the blocks [first, last) of a tile."""
    head_blocks: gl.constexpr = NUM_HEADS // HEADS
    of_split = num_tiles // num_splits
    row, split = number % of_split // head_blocks, number // of_split
    position = gl.load(positions + row)
    window_blocks: gl.constexpr = (WINDOW + KEYS - 1) // KEYS
    first, last = key_blocks(position, num_chosen, split, num_splits, RATIO, CHOSEN, window_blocks, KEYS)
    return row, position, number % head_blocks * HEADS, split, first, last


@gluon.jit
def _widen(words, factor):
    """int32 [keys, n] of four e4m3 codes each, times f32 [keys, 1]: int32 [keys, 2 n] of two bf16 each."""
    words, factor = gl.broadcast(words, factor)
    low, high = gl.inline_asm_elementwise(
        WIDEN, "=r,=r,r,f", [words, factor], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    return gl.reshape(gl.join(low, high), [words.shape[0], 2 * words.shape[1]])


@gluon.jit
def _locate(
    block, last, where, tables,
    WINDOW: gl.constexpr, RING: gl.constexpr, RATIO: gl.constexpr, PER_PAGE: gl.constexpr, CHOSEN: gl.constexpr,
):  # fmt: skip
    """Of each key of a block: its row in the step's, the ring's or the entries' planes, and which of them: 0, 1, 2.
    A row of -1 is no key, as all are behind the `last` block."""
    position, start, to_row, ring_first = where
    pages, chosen, num_chosen = tables
    key = block * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, READ))
    at = position - WINDOW + 1 + key
    own = at >= start
    index = gl.where(own, to_row + at, ring_first + at % RING)
    index = gl.where((at >= 0) & (key < WINDOW) & (block < last), index, -1)
    source = gl.where(own, 0, 1)
    if RATIO > 0:
        entry = key - (WINDOW + KEYS - 1) // KEYS * KEYS
        is_entry = (entry >= 0) & (block < last)
        if CHOSEN:
            entry = gl.load(chosen + entry, mask=is_entry & (entry < num_chosen), other=-1)
            is_entry = entry >= 0
        else:
            is_entry = is_entry & (entry < (position + 1) // RATIO)
        page = gl.load(pages + entry // PER_PAGE, mask=is_entry, other=0)
        index = gl.where(is_entry, page * PER_PAGE + entry % PER_PAGE, index)
        source = gl.where(is_entry, 2, source)
    return index, source


@gluon.jit
def _read(index, source, planes, GROUPS: gl.constexpr, BYTES: gl.constexpr, SCALES: gl.constexpr):
    """Stored rows in words: GROUPS tensors of e4m3 codes, the bf16 values behind them, the eight scale bytes."""
    step_data, step_scale, ring_data, ring_scale, entry_data, entry_scale = planes
    visible = index >= 0
    index = index.to(gl.int64)
    data = gl.where(source == 2, entry_data, gl.where(source == 1, ring_data, step_data)) + index * BYTES
    scale = gl.where(source == 2, entry_scale, gl.where(source == 1, ring_scale, step_scale)) + index * SCALES
    scales = gl.load(scale.to(gl.pointer_type(gl.int64)), mask=visible, other=0)
    words = gl.multiple_of(data, 16).to(gl.pointer_type(gl.int32))[:, None]
    lane = gl.arange(0, GROUP // 4, layout=gl.SliceLayout(0, READ))[None, :]
    codes = ()
    for group in gl.static_range(GROUPS):
        codes = codes + (gl.load(words + (group * (GROUP // 4) + lane), mask=visible[:, None], other=0),)  # noqa: RUF005  # Gluon has no starred
    lane = gl.arange(0, GROUP // 2, layout=gl.SliceLayout(0, READ))[None, :]
    tail = gl.load(words + (GROUPS * (GROUP // 4) + lane), mask=visible[:, None], other=0)
    return codes, tail, scales


@gluon.jit
def _fetch(index, source, planes, BYTES: gl.constexpr):
    """Bring stored rows, which are read a turn later, into the cache: memory is further away than a turn lasts."""
    step_data, _, ring_data, _, entry_data, _ = planes
    index = gl.convert_layout(index, gl.SliceLayout(1, LINES))
    source = gl.convert_layout(source, gl.SliceLayout(1, LINES))
    data = gl.where(source == 2, entry_data, gl.where(source == 1, ring_data, step_data))
    line = gl.arange(0, 8, layout=gl.SliceLayout(0, LINES))
    at = gl.minimum(line * LINE, BYTES - 1)[None, :]
    lines = (data + gl.maximum(index, 0).to(gl.int64) * BYTES)[:, None] + at
    gl.inline_asm_elementwise(FETCH, "=r,l", [lines.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _make_keys(
    tiles, rows, tables, planes, words, masks, full, empty,
    NUM_HEADS: gl.constexpr, WINDOW: gl.constexpr, RING: gl.constexpr, RATIO: gl.constexpr, PER_PAGE: gl.constexpr,
    CHOSEN: gl.constexpr, BYTES: gl.constexpr, SCALES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """The readers: the blocks of all tiles into the buffers, in turn. Addresses are two blocks ahead, reads one."""
    GROUPS: gl.constexpr = words.shape[2] // (GROUP // 2) - 1
    num_tiles, num_splits = tiles
    slots, positions, firsts = rows
    page_table, all_chosen, num_pages, num_chosen = tables
    turn = 0
    for tile in tl.range(gl.program_id(0), num_tiles, gl.num_programs(0), disable_licm=True):
        row, position, _, _, first, last = _tile(
            tile, positions, num_chosen, num_tiles, num_splits, NUM_HEADS, RATIO, CHOSEN, WINDOW
        )
        slot = gl.load(slots + row)
        start = position - (row - gl.load(firsts + row))  # position of the request's first row of the step
        where = (position, start, row - position, slot * RING)
        mine = (page_table + slot.to(gl.int64) * num_pages, all_chosen + row.to(gl.int64) * num_chosen, num_chosen)
        index, source = _locate(first, last, where, mine, WINDOW, RING, RATIO, PER_PAGE, CHOSEN)
        codes, tail, scales = _read(index, source, planes, GROUPS, BYTES, SCALES)
        is_key = index >= 0
        index, source = _locate(first + 1, last, where, mine, WINDOW, RING, RATIO, PER_PAGE, CHOSEN)
        for block in tl.range(first, last, disable_licm=True):
            buffer = turn % BUFFERS
            mbarrier.wait(empty.index(buffer), (turn // BUFFERS + 1) & 1)  # at once when nobody has used it yet
            target = words.index(buffer)
            for group in gl.static_range(GROUPS):
                factor = power_of_two((scales >> (8 * group)).to(gl.int32) & 255)
                widened = _widen(codes[group], factor[:, None])
                target.slice(group * (GROUP // 2), GROUP // 2, dim=1).store(widened)
            target.slice(GROUPS * (GROUP // 2), GROUP // 2, dim=1).store(tail)
            masks.index(buffer).store(gl.where(is_key, 0.0, float("-inf")))
            fence_async_shared()
            meet()
            mbarrier.arrive(full.index(buffer), count=1)
            codes, tail, scales = _read(index, source, planes, GROUPS, BYTES, SCALES)
            is_key = index >= 0
            index, source = _locate(block + 2, last, where, mine, WINDOW, RING, RATIO, PER_PAGE, CHOSEN)
            if CHOSEN and not SPLIT:  # of few rows, or entries that lie together, it gains nothing (measured)
                _fetch(index, source, planes, BYTES)
            turn += 1


@gluon.jit
def _add_own(scores):
    """f32 [HEADS, KEYS] to [HEADS, 8]: of each row what a thread has of it, added up, so without any other's."""
    even, odd = gl.split(gl.reshape(scores, [HEADS, KEYS // 2, 2]))
    four = gl.reshape(even + odd, [HEADS, 2, 2, 2, 4])  # of warps, in registers twice, of lanes
    even, odd = gl.split(gl.permute(four, [0, 1, 2, 4, 3]))
    even, odd = gl.split(gl.permute(even + odd, [0, 1, 3, 2]))
    return gl.reshape(even + odd, [HEADS, 8])


@gluon.jit
def _copy_queries(q, q_row, tile, of_split, queries, NUM_HEADS: gl.constexpr):
    """Begin to copy those of a tile."""
    DIM: gl.constexpr = queries.shape[1]
    head_blocks: gl.constexpr = NUM_HEADS // HEADS
    row, first_head = tile % of_split // head_blocks, tile % head_blocks * HEADS
    of_head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, WIDE))[:, None] * DIM
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, WIDE))[None, :]
    copy_ahead(queries, q + row.to(gl.int64) * q_row + first_head * DIM + of_head + dim)
    async_copy.commit_group()


@gluon.jit
def _multiply(
    tiles, positions, num_chosen, sink, rotations, results, q, q_row, score_scale, queries, weights, keys, masks, full,
    empty,
    NUM_HEADS: gl.constexpr, ROPE: gl.constexpr, WINDOW: gl.constexpr, RATIO: gl.constexpr, CHOSEN: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """The other warps: of each tile one softmax over its keys, and the result."""
    num_tiles, num_splits = tiles
    out, partial, partial_top, partial_total = results
    DIM: gl.constexpr = keys.shape[2]
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, SCORES))
    zeros = gl.zeros([HEADS, KEYS], gl.float32, layout=SCORES)
    of_split = num_tiles // num_splits
    number = gl.program_id(0)
    _copy_queries(q, q_row, number, of_split, queries, NUM_HEADS)
    turn = 0
    for tile in tl.range(number, num_tiles, gl.num_programs(0), disable_licm=True):
        row, _, first_head, split, first, last = _tile(
            tile, positions, num_chosen, num_tiles, num_splits, NUM_HEADS, RATIO, CHOSEN, WINDOW
        )
        # The sink is the first key, of the first split, and has no value. A sink of -inf is none.
        sink_top = gl.maximum(gl.load(sink + first_head + head) * 1.4426950408889634, -1e30)
        top = sink_top
        # Of the keys that a thread has: no warp asks another one for its part until the end.
        totals = _add_own(zeros)
        sums = gl.zeros([HEADS, DIM], gl.float32, layout=SUMS)
        async_copy.wait_group(0)
        fence_async_shared()
        meet()
        for block in tl.range(first, last, disable_licm=True):
            buffer = turn % BUFFERS
            mbarrier.wait(full.index(buffer), (turn // BUFFERS) & 1)
            rows = keys.index(buffer)
            scores = warpgroup_mma(queries, rows.permute([1, 0]), zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            scores = scores * score_scale + masks.index(buffer).load(gl.SliceLayout(0, SCORES))[None, :]
            new_top = gl.maximum(top, gl.max(scores, axis=1))
            scores = gl.exp2(scores - new_top[:, None])
            shrink = gl.exp2(top - new_top)
            own = _add_own(scores)
            totals = totals * gl.convert_layout(shrink, gl.SliceLayout(1, own.type.layout))[:, None] + own
            top = new_top
            weights.store(scores.to(gl.bfloat16))
            sums = sums * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
            fence_async_shared()
            meet()
            sums = warpgroup_mma(weights, rows, sums, is_async=True)
            sums = warpgroup_mma_wait(0, deps=[sums])
            meet()
            mbarrier.arrive(empty.index(buffer), count=1, pred=block + 1 < last)  # the result goes through the last one
            turn += 1
        if first < last:
            total = gl.convert_layout(gl.sum(totals, axis=1), gl.SliceLayout(1, SCORES))
            if split == 0:
                total += gl.exp2(sink_top - top)
            if SPLIT:
                part = (row.to(gl.int64) * num_splits + split) * NUM_HEADS + first_head
                of_head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, SUMS))[:, None] * DIM
                dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, SUMS))[None, :]
                gl.store(partial + part * DIM + of_head + dim, sums)
                gl.store(partial_top + part + head, top)
                gl.store(partial_total + part + head, total)
            else:
                sums = sums / gl.convert_layout(total, gl.SliceLayout(1, SUMS))[:, None]
                at = out + (row.to(gl.int64) * NUM_HEADS + first_head) * DIM
                _store(sums, at, rotations + row * ROPE, keys.index((turn - 1) % BUFFERS), ROPE)
            mbarrier.arrive(empty.index((turn - 1) % BUFFERS), count=1)
        following = tile + gl.num_programs(0)
        if following < num_tiles:
            _copy_queries(q, q_row, following, of_split, queries, NUM_HEADS)


@gluon.jit
def _store(sums, out, rotations, rows, ROPE: gl.constexpr):
    """f32 [heads, dim] to `out` as bf16, the last ROPE dims turned back; by way of the shared memory `rows`."""
    DIM: gl.constexpr = rows.shape[1]
    rows.store(sums.to(gl.bfloat16))
    meet()
    of_head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, WIDE))[:, None] * DIM
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, WIDE))[None, :]
    gl.store(out + of_head + dim, rows.load(WIDE), mask=dim < DIM - ROPE)
    tail = rows.slice(DIM - ROPE, ROPE, dim=1).load(TURN).to(gl.float32)
    meet()
    even, odd = gl.split(gl.reshape(tail, [HEADS, ROPE // 2, 2]))
    pair = rotations + 2 * gl.arange(0, ROPE // 2, layout=gl.SliceLayout(0, even.type.layout))[None, :]
    cosine, sine = gl.load(pair), gl.load(pair + 1)
    turned = gl.join(even * cosine + odd * sine, odd * cosine - even * sine)
    turned = gl.convert_layout(gl.reshape(turned, [HEADS, ROPE]).to(gl.bfloat16), TURN)
    of_head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, TURN))[:, None] * DIM
    dim = DIM - ROPE + gl.arange(0, ROPE, layout=gl.SliceLayout(0, TURN))[None, :]
    gl.store(out + of_head + dim, turned)


@gluon.jit(do_not_specialize=["num_splits", "num_tiles"])
def attend_specialized(
    q, sink, rotations, slots, positions, firsts,
    step_data, step_scale, ring_data, ring_scale, entry_data, entry_scale, page_table, chosen,
    out, partial, partial_top, partial_total, q_row, num_pages, num_chosen, num_splits, score_scale, num_tiles,
    NUM_HEADS: gl.constexpr, DIM: gl.constexpr, ROPE: gl.constexpr, SCALES: gl.constexpr, WINDOW: gl.constexpr,
    RING: gl.constexpr, RATIO: gl.constexpr, PER_PAGE: gl.constexpr, CHOSEN: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Arguments and result are those of `_attend`; `num_tiles` are all, of which there are not more programs."""
    wait_for_previous()
    queries = gl.allocate_shared_memory(gl.bfloat16, [HEADS, DIM], ROWS)
    words = gl.allocate_shared_memory(gl.int32, [BUFFERS, KEYS, DIM // 2], WORDS)
    keys = seen_as(words, gl.bfloat16, [BUFFERS, KEYS, DIM], ROWS)
    weights = gl.allocate_shared_memory(gl.bfloat16, [HEADS, KEYS], ROWS)
    masks = gl.allocate_shared_memory(gl.float32, [BUFFERS, KEYS], PLAIN)
    full, empty = buffer_barriers(BUFFERS, 1)
    tiles, rows = (num_tiles, num_splits), (slots, positions, firsts)
    tables, results = (page_table, chosen, num_pages, num_chosen), (out, partial, partial_top, partial_total)
    planes = (step_data, step_scale, ring_data, ring_scale, entry_data, entry_scale)
    gl.warp_specialize(
        [
            (_multiply, (
                tiles, positions, num_chosen, sink, rotations, results, q, q_row, score_scale, queries, weights, keys,
                masks, full, empty, NUM_HEADS, ROPE, WINDOW, RATIO, CHOSEN, SPLIT,
            )),
            (_make_keys, (
                tiles, rows, tables, planes, words, masks, full, empty,
                NUM_HEADS, WINDOW, RING, RATIO, PER_PAGE, CHOSEN, DIM + ROPE, SCALES, SPLIT,
            )),
        ],
        [READERS],
        [READER_REGISTERS],
    )  # fmt: skip
