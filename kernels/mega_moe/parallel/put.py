"""Rows that a kernel writes straight into the memory of another rank, in Triton. The way back is in `experts.down`.

A rank's memory is a buffer with planes (symmetric.py); what others write into it they find by the buffer's address and
the plane's offset, which is the same on all ranks; both are multiples of 16, so that stores are of 16 bytes. No row is
packed or sorted, and nothing is read by the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.quant.triton import e2m1_values

BLOCK = 1024  # words that a program copies together


@triton.jit
def _copy(source, target, num: tl.constexpr, SIZE: tl.constexpr):
    """`num` elements, SIZE together; a power of two."""
    for start in tl.static_range(0, num, SIZE):
        at = start + tl.arange(0, SIZE)
        tl.store(target + at, tl.load(source + at, mask=at < num, other=0), mask=at < num)


@triton.jit(do_not_specialize=["num_tokens", "capacity", "me"])
def dispatch(
    values,  # int32 [tokens, WORDS], quantised
    scales,  # uint8 [tokens, SCALES]
    ids,  # [tokens, TOP_K], -1 = no expert
    weights,  # f32 [tokens, TOP_K]
    map_ranks,  # int64 [experts, COPIES]
    map_slots,
    map_copies,  # int64 [experts]
    buffers,  # int64 [ranks], addresses
    counts,  # int64 [2]: rows that this rank has sent to others, and pairs that come back from there
    num_tokens,
    capacity,  # rows that a rank has
    me,
    VALUES_AT: tl.constexpr,  # offsets of the planes
    SCALES_AT: tl.constexpr,
    SLOTS_AT: tl.constexpr,
    WEIGHTS_AT: tl.constexpr,
    WORDS: tl.constexpr,
    SCALES: tl.constexpr,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,  # TOP_K padded to a power of two
    COPIES: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE_SIZE: tl.constexpr,
):
    """One program for each row and each rank. Rows behind the last token become rows without experts."""
    token = tl.program_id(0).to(tl.int64)
    peer = tl.program_id(1)
    lane = tl.arange(0, LANES)
    inside = (lane < TOP_K) & (token < num_tokens)
    expert = tl.load(ids + token * TOP_K + lane, mask=inside, other=-1).to(tl.int64)
    there = expert >= 0
    copy = (token + me) % tl.load(map_copies + expert, mask=there, other=1)  # as ExpertMap.targets
    rank = tl.load(map_ranks + expert * COPIES + copy, mask=there, other=-1)
    slot = tl.load(map_slots + expert * COPIES + copy, mask=there, other=-1)
    slot = tl.where(rank == peer, slot, -1)
    buffer = tl.load(buffers + peer)
    row = me * capacity + token
    target = (buffer + SLOTS_AT).to(tl.pointer_type(tl.int32)) + row * TOP_K + lane
    tl.store(target, slot.to(tl.int32), mask=lane < TOP_K)
    if tl.max(slot, 0) < 0:
        return
    target = (buffer + WEIGHTS_AT).to(tl.pointer_type(tl.float32)) + row * TOP_K + lane
    tl.store(target, tl.load(weights + token * TOP_K + lane, mask=inside, other=0.0), mask=lane < TOP_K)
    target = tl.multiple_of(buffer.to(tl.pointer_type(tl.int32)), 16) + VALUES_AT // 4
    _copy(values + token * WORDS, target + row * WORDS, WORDS, SIZE)
    if SCALES > 0:
        target = (buffer + SCALES_AT).to(tl.pointer_type(tl.uint8)) + row * SCALES
        _copy(scales + token * SCALES, target, SCALES, SCALE_SIZE)
    if peer != me:
        tl.atomic_add(counts, 1)
        tl.atomic_add(counts + 1, tl.sum((slot >= 0).to(tl.int64), 0))


@triton.jit
def widen(
    values,  # uint8: e4m3 [rows, WIDTH] or two FP4 a byte [rows, WIDTH / 2]
    scales,  # uint8 [rows, WIDTH / GROUP]
    slots,  # int32 [rows, TOP_K]
    out,  # bf16 [rows, WIDTH]
    FP4: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,
    SIZE: tl.constexpr,  # values together, a power of two
):
    """What codes stand for, exactly, of the rows that came: the input of products in bf16."""
    GROUP: tl.constexpr = 32 if FP4 else 128
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    if tl.max(tl.load(slots + row * TOP_K + lane, mask=lane < TOP_K, other=-1), 0) < 0:
        return
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < WIDTH
    exponent = tl.load(scales + row * (WIDTH // GROUP) + at // GROUP, mask=inside, other=0).to(tl.int32)
    if FP4:
        code = tl.load(values + row * (WIDTH // 2) + at // 2, mask=inside, other=0).to(tl.int32)
        value = e2m1_values((code >> (at % 2 * 4)) & 15)
    else:
        value = tl.load(values + row * WIDTH + at, mask=inside, other=0).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    value *= (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(out + row * WIDTH + at, value.to(tl.bfloat16), mask=inside)
