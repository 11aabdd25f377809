"""KV compression in Triton: from raw rows to stored entries in one launch; the two C4 compressors of a layer share it.

Any mix of decode, verify and prefill rows. The raw rows of a step are read where the projection left them; the position
bias, pooling, rounding, RMSNorm, RoPE, quantisation, the store into the page row and the slot's state are one kernel.

Each compressor has one program per row of the step, and most exit at once: only a row that closes an entry has work,
and the first row of each request, its *head*. In one launch nothing orders the programs, so all that touches a slot's
state is the head's, which reads it before it writes it; what the other programs read, no program writes.

- C4: positions before the step (the ring) are read by the first two entries that the step can close, start // 4 and
  start // 4 + 1: entry e pools positions 4e - 4 .. 4e + 3, and 4 (start // 4 + 2) - 4 > start. The head closes those
  two, then writes the last rows of the step to the ring. Each further entry reads rows of the step only.
- C128: the slot's state is read by the block of the first row and written by the block that stays open. The head
  advances both; blocks between them start and end in the step and need no state.

Speculation: the C4 ring needs nothing (rejected rows are rewritten before an entry reads them). Of a C128 state a slot
has a bank for each row that a verify can have. Of a request with no more rows than that, verify or not, the head takes
one row after the other and leaves what holds behind the j-th in bank j; the caller copies the bank of the last row that
stays to bank 0, from which the next step goes on.

The running state of C128 is rounded after each tile of rows, in registers as in memory. In deterministic mode a tile is
one row, so it does not show where steps ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.compressor.reference import LOWEST
from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.deterministic import is_deterministic
from dsv4_kernels.kv_store import Format, Planes, RowFormat
from dsv4_kernels.metadata import C4, C128
from dsv4_kernels.metadata.rows import Rows
from dsv4_kernels.quant.device import e2m1_bytes, hadamard, inverse_power_of_two, scale_exponent, scaled_groups
from dsv4_kernels.rope.device import interleave, rotate_pairs, split_pairs

LEAST: tl.constexpr = tl.constexpr(LOWEST)
FORMATS = (Format.F32, Format.KV_FP8, Format.INDEX_FP4)


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
        first = tl.arange(0, 16)[:, None] == 0  # the least rows of a matrix product; the others are zero
        values = interleave(even, odd)[None, :]
        turned = hadamard(tl.where(first, values, 0.0).to(tl.bfloat16), BLOCK).to(tl.float32)
        scaled, exponent = scaled_groups(tl.sum(turned, axis=0)[None, :], 32, FP4=True)
        tl.store(data + page_row * (D // 2) + pair, e2m1_bytes(tl.reshape(scaled, [BLOCK])))
        group = tl.arange(0, BLOCK // 32)
        tl.store(scales + page_row * (D // 32) + group, tl.reshape(exponent, [BLOCK // 32]).to(tl.uint8))


@triton.jit
def _page_row(page_table, slot, table_width, entry, PER_PAGE: tl.constexpr):
    page = tl.load(page_table + slot * table_width + entry // PER_PAGE).to(tl.int64)
    return page * PER_PAGE + entry % PER_PAGE


@triton.jit
def _close_c4(
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
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    if position >= 0:
        slot, first, count = tl.load(slots + row).to(tl.int64), tl.load(firsts + row), tl.load(counts + row)
        start = position - (row - first).to(tl.int32)
        is_head = row == first
        # Entries of this program: begin .. end - 1.
        begin = tl.where(is_head, start // 4, position // 4)
        closes = (position % 4 == 3) & (begin >= start // 4 + 2)
        end = tl.where(is_head, tl.minimum(begin + 2, (start + count) // 4), begin + closes.to(tl.int32))
        pick = tl.arange(0, 8)[:, None]  # of the rows that an entry pools: early halves, then current halves
        dim = tl.arange(0, BLOCK)[None, :]
        for entry in range(begin, end):
            source = 4 * entry - 4 + pick
            column = pick // 4 * D + dim
            new, old = (source >= start) & (dim < D), (source < start) & (source >= 0) & (dim < D)
            fresh = raw + (first + source - start).to(tl.int64) * raw_stride + column
            stored = ring + (slot * RING + source % RING) * (4 * D) + column
            kv = tl.load(fresh, mask=new, other=0.0) + tl.load(stored, mask=old, other=0.0)
            gate = tl.load(fresh + 2 * D, mask=new, other=0.0)
            gate += tl.load(ape + source % 4 * (2 * D) + column, mask=new, other=0.0)
            gate += tl.load(stored + 2 * D, mask=old, other=0.0)
            gate = tl.where(source >= 0, gate, float("-inf"))
            weights = tl.exp(gate - tl.max(gate, axis=0)[None, :])
            pooled = tl.sum(weights * kv, axis=0) / tl.sum(weights, axis=0)
            pooled = tl.where(tl.arange(0, BLOCK) < D, pooled, 0.0)
            rotation = rotations + (first + 4 * entry + 3 - start).to(tl.int64) * ROPE
            page_row = _page_row(page_table, slot, table_width, entry, PER_PAGE)
            _store_entry(pooled, norm, rotation, data, rope_data, scales, page_row, eps, D, ROPE, FORMAT, BLOCK)
        if is_head:
            tl.debug_barrier()  # all threads have read the ring
            part = tl.arange(0, 4)[:, None]
            column = part * D + dim
            for step in range(tl.maximum(count - RING, 0), count):
                source = start + step
                value = tl.load(raw + (first + step).to(tl.int64) * raw_stride + column, mask=dim < D)
                bias = ape + source % 4 * (2 * D) + column - 2 * D
                value += tl.load(bias, mask=(dim < D) & (part >= 2), other=0.0)
                tl.store(ring + (slot * RING + source % RING) * (4 * D) + column, value, mask=dim < D)


@triton.jit
def _c4(
    raw,  # of the first compressor, as of `_close_c4`
    ape,
    ring,
    norm,
    data,
    rope_data,
    scales,
    raw_stride,
    raw_2,  # of the second
    ape_2,
    ring_2,
    norm_2,
    data_2,
    rope_data_2,
    scales_2,
    raw_stride_2,
    slots,
    positions,
    firsts,
    counts,
    page_table,
    rotations,
    table_width,
    eps,
    D: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    D_2: tl.constexpr,
    FORMAT_2: tl.constexpr,
    BLOCK_2: tl.constexpr,
    ROPE: tl.constexpr,
    RING: tl.constexpr,
    PER_PAGE: tl.constexpr,
):
    wait_for_previous()
    if tl.program_id(1) == 0:
        _close_c4(
            raw, ape, ring, norm, data, rope_data, scales, raw_stride, slots, positions, firsts, counts,
            page_table, rotations, table_width, eps, D, FORMAT, BLOCK, ROPE, RING, PER_PAGE,
        )  # fmt: skip
    else:
        _close_c4(
            raw_2, ape_2, ring_2, norm_2, data_2, rope_data_2, scales_2, raw_stride_2, slots, positions, firsts, counts,
            page_table, rotations, table_width, eps, D_2, FORMAT_2, BLOCK_2, ROPE, RING, PER_PAGE,
        )  # fmt: skip


@triton.jit
def _c128(
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
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    if position < 0:
        return
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


@dataclass(frozen=True)
class C4Compressor:
    """What one C4 compressor reads and writes, d being the dims of `row_format`.

    Args:
        raw: f32 [T, 4 * d], kv early | kv current | gate early | gate current without bias; columns are contiguous,
            rows may be those of a wider product.
        ape: f32 [4, 2 * d], added to the gates. norm: f32 [d].
        ring: f32 [slots, ring_rows, 4 * d], raw rows with bias by position % ring_rows; ring_rows >= 8.
        planes: of `row_format` (F32 or KV_FP8 with d and the rope dims, INDEX_FP4 with d); only rows of closed entries
            are written, and of those not the padding of the scales.
    """

    raw: Tensor
    ape: Tensor
    norm: Tensor
    ring: Tensor
    planes: Planes
    row_format: RowFormat


def compress_c4(
    compressors: Sequence[C4Compressor],
    eps: float,
    rotations: Tensor,
    rows: Rows,
    page_table: Tensor,
    page_tokens: int,
) -> None:
    """Close the C4 entries that the step completes and advance the rings, of one or two compressors in one launch.

    Equal to `pool_c4` over the last eight positions of each closing row, `finish`, for INDEX_FP4 `hadamard`, and
    `kv_store.encode`; entries round to bfloat16 where the format is not F32.

    Args:
        compressors: one or two, with rings of as many rows.
        rotations: complex64 [T, rope_dim / 2], row r at position positions[r] // 4 * 4.
        page_table: int32 [slots, pages]; `page_tokens` positions a page.

    Raises ValueError for formats and sizes that the kernels do not take.
    """
    tensors: list[Tensor | int] = []
    sizes: dict[str, int | str] = {}
    for suffix, each in zip(("", "_2"), (compressors[0], compressors[-1]), strict=True):
        dim, row_format = each.ring.shape[-1] // 4, each.row_format
        _check(each.raw, 4 * dim, rotations, row_format, dim, C4)
        stored = _stored(each.planes, row_format)
        tensors += [each.raw, each.ape, each.ring, each.norm, *stored, each.raw.stride(0)]
        block = triton.next_power_of_2(dim)
        sizes |= {f"D{suffix}": dim, f"FORMAT{suffix}": row_format.format.value, f"BLOCK{suffix}": block}
    if len(rows.slots):
        _c4[(len(rows.slots), len(compressors))](
            *tensors,
            *_places(rows, page_table, rotations),
            page_table.shape[1],
            eps,
            **sizes,
            ROPE=2 * rotations.shape[1],
            RING=compressors[0].ring.shape[1],
            PER_PAGE=page_tokens // C4,
            num_warps=4,
            launch_pdl=launches_early(page_table.device),
        )


def compress_c128(
    raw: Tensor,
    ape: Tensor,
    norm: Tensor,
    eps: float,
    rotations: Tensor,
    rows: Rows,
    page_table: Tensor,
    page_tokens: int,
    state: Tensor,
    planes: Planes,
    row_format: RowFormat,
) -> None:
    """Close the C128 entries that the step completes and advance the running states: `online_update`, `finish`, encode.

    Args: as of `compress_c4` and `C4Compressor`, but for
        raw: f32 [T, 2 * d], kv | gate without bias. ape: f32 [128, d].
        rotations: row r at position positions[r] // 128 * 128.
        state: f32 [slots, banks, 3, d], max, sum and weighted mean of the open block; bank 0 is where the step begins,
            not read where a block starts. A request with at most `banks` rows leaves in bank j what holds behind its
            j-th row (nothing behind the end of a block), another one in bank 0 what holds behind its last row.
    """
    dim = state.shape[-1]
    _check(raw, 2 * dim, rotations, row_format, dim, C128)
    if raw.shape[0]:
        _c128[(raw.shape[0],)](
            raw,
            ape,
            state,
            norm,
            *_stored(planes, row_format),
            *_places(rows, page_table, rotations),
            raw.stride(0),
            page_table.shape[1],
            eps,
            D=dim,
            ROPE=2 * rotations.shape[1],
            PER_PAGE=page_tokens // C128,
            FORMAT=row_format.format.value,
            BANKS=state.shape[1],
            BLOCK=triton.next_power_of_2(dim),
            BLOCK_R=1 if is_deterministic() else 16,
            num_warps=16,
            launch_pdl=launches_early(raw.device),
        )


def _check(raw: Tensor, width: int, rotations: Tensor, row_format: RowFormat, dim: int, ratio: int) -> None:
    found = f"compress_c{ratio}: {row_format} and raw rows {list(raw.shape)}, {raw.dtype}, strides {raw.stride()}"
    if row_format.format not in FORMATS or row_format.dim != dim:
        raise ValueError(f"{found}; the format must be one of {', '.join(FORMATS)} with dim {dim}")
    if row_format.format is Format.INDEX_FP4 and (dim < 32 or dim & (dim - 1)):
        raise ValueError(f"{found}; INDEX_FP4 takes a dim that is a power of two, at least 32")
    if row_format.format is Format.KV_FP8 and (row_format.rope_dim != 2 * rotations.shape[1] or dim < 64):
        raise ValueError(f"{found}; rotations are {list(rotations.shape)}, the format must rotate as many dims")
    if raw.dtype != torch.float32 or raw.shape[1:] != (width,) or raw.stride(1) != 1:
        raise ValueError(f"{found}; expected float32 [T, {width}] with contiguous columns")


def _stored(planes: Planes, row_format: RowFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of both kernels from `data` to `scales`."""
    data = planes[0]
    if row_format.format is Format.F32:
        data = data.view(torch.float32)
    rope_data = data.view(torch.bfloat16) if row_format.format is Format.KV_FP8 else data
    return data, rope_data, planes[-1]


def _places(rows: Rows, page_table: Tensor, rotations: Tensor) -> tuple[Tensor, ...]:
    """Arguments of both kernels from `slots` to `rotations`."""
    return rows.slots, rows.positions, rows.firsts, rows.counts, page_table, torch.view_as_real(rotations)
