"""Compressors in registers: what one row of a step has to do for each of them. How rows share the work: triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.compressor.reference import LOWEST
from dsv4_kernels.quant.device import e2m1_codes, hadamard_one, inverse_power_of_two, scale_exponent, scaled_groups
from dsv4_kernels.rope.device import interleave, rotate_pairs, split_pairs

LEAST: tl.constexpr = tl.constexpr(LOWEST)


@triton.jit
def _store_entry(
    pooled,  # f32 [BLOCK]
    norm,
    rotation,  # the entry's row of the table
    data,
    rope_data,
    scales,
    page_row,
    eps,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pooled values to a page row: round, RMSNorm, RoPE, then the row format. Rounds to bfloat16 but for "f32"."""
    even, odd = split_pairs(pooled)
    pair = tl.arange(0, BLOCK // 2)
    inside = pair < D // 2
    if FORMAT != "f32":
        even, odd = even.to(tl.bfloat16).to(tl.float32), odd.to(tl.bfloat16).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(even * even + odd * odd) / D + eps)
    even = even * inverse * tl.load(norm + 2 * pair, mask=inside, other=0.0)
    odd = odd * inverse * tl.load(norm + 2 * pair + 1, mask=inside, other=0.0)
    if FORMAT != "f32":
        even, odd = even.to(tl.bfloat16).to(tl.float32), odd.to(tl.bfloat16).to(tl.float32)
    even, odd = rotate_pairs(even, odd, rotation, True, D // 2, ROPE // 2)
    if FORMAT == "f32":
        dim = tl.arange(0, BLOCK)
        tl.store(data + page_row * D + dim, interleave(even, odd), mask=dim < D)
    elif FORMAT == "kv_fp8":
        nope: tl.constexpr = D - ROPE
        values = tl.reshape(interleave(even, odd), [BLOCK // 64, 64]).to(tl.bfloat16)
        group, column = tl.arange(0, BLOCK // 64)[:, None], tl.arange(0, 64)[None, :]
        dim = group * 64 + column
        width: tl.constexpr = nope // 2 + ROPE  # bfloat16 units of a row's bytes
        tl.store(rope_data + page_row * width + dim - nope // 2, values, mask=(dim >= nope) & (dim < D))
        values = values.to(tl.float32)
        exponent = scale_exponent(values, 1, FP4=False)
        codes = (values * inverse_power_of_two(exponent)[:, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        tl.store(data + page_row * 2 * width + dim, codes, mask=dim < nope)
        group = tl.arange(0, BLOCK // 64)
        row_scales: tl.constexpr = (nope // 64 + 7) // 8 * 8
        tl.store(scales + page_row * row_scales + group, exponent.to(tl.uint8), mask=group < nope // 64)
    else:
        turned = hadamard_one(interleave(even, odd).to(tl.bfloat16).to(tl.float32), BLOCK)
        scaled, exponent = scaled_groups(turned.to(tl.bfloat16).to(tl.float32)[None, :], 32, FP4=True)
        # As words: single bytes got a stack from Triton 3.6 and 3.9.
        codes = tl.reshape(e2m1_codes(scaled), (BLOCK // 8, 8)) << (4 * tl.arange(0, 8))[None, :]
        words = (data + page_row * (D // 2)).to(tl.pointer_type(tl.int32))
        tl.store(words + tl.arange(0, BLOCK // 8), tl.sum(codes, axis=1))
        group = tl.arange(0, BLOCK // 32)
        tl.store(scales + page_row * (D // 32) + group, tl.reshape(exponent, [BLOCK // 32]).to(tl.uint8))


@triton.jit
def _page_row(page_table, slot, table_width, entry, PER_PAGE: tl.constexpr):
    page = tl.load(page_table + slot * table_width + entry // PER_PAGE).to(tl.int64)
    return page * PER_PAGE + entry % PER_PAGE


@triton.jit
def close_c4(
    row,  # int64
    raw,  # f32 [rows, 4 * D]: kv early | kv current | gate early | gate current
    ape,  # f32 [4, 2 * D]
    ring,  # f32 [slots, RING, 4 * D], like raw with the bias in the gates
    norm,
    data,
    rope_data,
    scales,
    raw_stride,
    slots,
    positions,
    firsts,
    counts,
    page_table,  # int32 [slots, table_width]
    rotations,  # f32 [rows, ROPE]
    table_width,
    eps,
    D: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,  # D padded to a power of two
    ROPE: tl.constexpr,
    RING: tl.constexpr,
    PER_PAGE: tl.constexpr,
):
    """What one row has to do for one compressor."""
    position = tl.load(positions + row)
    if position >= 0:
        slot, first, count = tl.load(slots + row).to(tl.int64), tl.load(firsts + row), tl.load(counts + row)
        start = position - (row - first).to(tl.int32)
        is_head = row == first
        # Entries of this program: begin .. end - 1.
        begin = tl.where(is_head, start // 4, position // 4)
        closes = (position % 4 == 3) & (begin >= start // 4 + 2)
        end = tl.where(is_head, tl.minimum(begin + 2, (start + count) // 4), begin + closes.to(tl.int32))
        dim = tl.arange(0, BLOCK)
        inside = dim < D
        raw += (first - start).to(tl.int64) * raw_stride  # of position 0 of the request
        ring += slot * (RING * 4 * D)
        for entry in range(begin, end):
            largest = tl.full([BLOCK], LEAST, tl.float32)
            total, pooled = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for half in range(2):  # of the rows that an entry pools: early halves, then current halves
                for step in tl.static_range(4):  # whose loads are under way together
                    source = 4 * (entry - 1 + half) + step
                    new, old = (source >= start) & inside, (source < start) & (source >= 0) & inside
                    column = half * D + dim
                    fresh = raw + source.to(tl.int64) * raw_stride + column
                    stored = ring + source % RING * (4 * D) + column
                    kv = tl.load(fresh, mask=new, other=0.0) + tl.load(stored, mask=old, other=0.0)
                    gate = tl.load(fresh + 2 * D, mask=new, other=0.0) + tl.load(stored + 2 * D, mask=old, other=0.0)
                    gate += tl.load(ape + step * (2 * D) + column, mask=new, other=0.0)
                    gate = tl.where(source >= 0, gate, LEAST)
                    new_largest = tl.maximum(largest, gate)
                    shrink, weight = tl.exp(largest - new_largest), tl.exp(gate - new_largest)
                    weight = tl.where(source >= 0, weight, 0.0)
                    total = tl.fma(total, shrink, weight)  # by name: the same bits in every kernel
                    pooled = tl.fma(weight, kv, pooled * shrink)
                    largest = new_largest
            pooled = tl.where(inside, pooled / total, 0.0)
            rotation = rotations + (first + 4 * entry + 3 - start).to(tl.int64) * ROPE
            page_row = _page_row(page_table, slot, table_width, entry, PER_PAGE)
            _store_entry(pooled, norm, rotation, data, rope_data, scales, page_row, eps, D, ROPE, FORMAT, BLOCK)
        if is_head:
            tl.debug_barrier()  # all threads have read the ring
            for step in range(tl.maximum(count - RING, 0), count):
                source = start + step
                for part in tl.static_range(4):
                    column = part * D + dim
                    value = tl.load(raw + source.to(tl.int64) * raw_stride + column, mask=inside)
                    if part >= 2:
                        value += tl.load(ape + source % 4 * (2 * D) + (column - 2 * D), mask=inside)
                    tl.store(ring + source % RING * (4 * D) + column, value, mask=inside)


@triton.jit
def advance_c128(
    row,  # int64
    raw,  # f32 [rows, 2 * D]: kv | gate
    ape,  # f32 [128, D]
    state,  # f32 [slots, BANKS, 3, D]: max, sum, weighted mean
    norm,
    data,
    rope_data,
    scales,
    slots,
    positions,
    firsts,
    counts,
    page_table,  # int32 [slots, table_width]
    rotations,  # f32 [rows, ROPE]
    raw_stride,
    table_width,
    eps,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    PER_PAGE: tl.constexpr,
    FORMAT: tl.constexpr,
    BANKS: tl.constexpr,
    BLOCK: tl.constexpr,  # D padded to a power of two
    BLOCK_R: tl.constexpr,  # rows that are read at once
):
    """What one row has to do."""
    position = tl.load(positions + row)
    if position >= 0:
        slot, first, count = tl.load(slots + row).to(tl.int64), tl.load(firsts + row), tl.load(counts + row)
        start = position - (row - first).to(tl.int32)
        end = start + count
        is_head = row == first
        block = position // 128
        closes = (position % 128 == 127) & (block > start // 128)
        stays_open = (end % 128 != 0) & (end // 128 > block)
        num_blocks = tl.where(is_head, 1 + stays_open.to(tl.int32), closes.to(tl.int32))
        has_banks = count <= BANKS
        num_read = tl.where(has_banks, 1, BLOCK_R)
        dim = tl.arange(0, BLOCK)
        inside = dim < D
        for turn in range(num_blocks):
            block = tl.where(turn == 0, block, end // 128)
            low, high = tl.maximum(start, 128 * block), tl.minimum(end, 128 * block + 128)
            kept = state + slot * (BANKS * 3 * D) + dim
            resumes = dim < tl.where(low % 128 == 0, 0, D)
            largest = tl.load(kept, mask=resumes, other=LEAST)
            total = tl.load(kept + D, mask=resumes, other=0.0)
            mean = tl.load(kept + 2 * D, mask=resumes, other=0.0)
            for tile in range(low, high, num_read):
                reached = tl.minimum(tile + num_read, high)
                source = tile + tl.arange(0, BLOCK_R)[:, None]
                keep = (source < reached) & inside[None, :]
                at = raw + (first + source - start).to(tl.int64) * raw_stride + dim[None, :]
                gate = tl.load(at + D, mask=keep, other=float("-inf"))
                gate += tl.load(ape + source % 128 * D + dim[None, :], mask=keep, other=0.0)
                new_largest = tl.maximum(largest, tl.max(gate, axis=0))
                weights = tl.exp(gate - new_largest[None, :])
                old = total * tl.exp(largest - new_largest)
                total = old + tl.sum(weights, axis=0)
                mean = mean * old + tl.sum(weights * tl.load(at, mask=keep, other=0.0), axis=0)
                mean = mean / tl.where(inside, total, 1.0)
                largest = new_largest
                if (has_banks | (reached == high)) & (reached % 128 != 0):
                    bank = kept + tl.where(has_banks, reached - 1 - start, 0) * (3 * D)
                    tl.debug_barrier()  # all threads have read the state
                    tl.store(bank, largest, mask=inside)
                    tl.store(bank + D, total, mask=inside)
                    tl.store(bank + 2 * D, mean, mask=inside)
            if high % 128 == 0:
                rotation = rotations + (first + high - 1 - start).to(tl.int64) * ROPE
                page_row = _page_row(page_table, slot, table_width, block, PER_PAGE)
                _store_entry(mean, norm, rotation, data, rope_data, scales, page_row, eps, D, ROPE, FORMAT, BLOCK)
