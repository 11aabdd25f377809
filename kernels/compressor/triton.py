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
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.compressor.device import advance_c128, close_c4
from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.deterministic import is_deterministic
from dsv4_kernels.kv_store import Format, Planes, RowFormat
from dsv4_kernels.metadata import C4, C128
from dsv4_kernels.metadata.rows import Rows

FORMATS = (Format.F32, Format.KV_FP8, Format.INDEX_FP4)


@triton.jit
def _c4(
    raw,  # of the first compressor, as of `close_c4`
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
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        close_c4(
            row, raw, ape, ring, norm, data, rope_data, scales, raw_stride, slots, positions, firsts, counts,
            page_table, rotations, table_width, eps, D, FORMAT, BLOCK, ROPE, RING, PER_PAGE,
        )  # fmt: skip
    else:
        close_c4(
            row, raw_2, ape_2, ring_2, norm_2, data_2, rope_data_2, scales_2, raw_stride_2, slots, positions, firsts,
            counts, page_table, rotations, table_width, eps, D_2, FORMAT_2, BLOCK_2, ROPE, RING, PER_PAGE,
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
    advance_c128(
        tl.program_id(0).to(tl.int64), raw, ape, state, norm, data, rope_data, scales, slots, positions, firsts,
        counts, page_table, rotations, raw_stride, table_width, eps, D, ROPE, PER_PAGE, FORMAT, BANKS, BLOCK,
        BLOCK_R,
    )  # fmt: skip


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


@dataclass(frozen=True)
class C128Compressor:
    """What a C128 compressor reads and writes; see `compress_c128`."""

    raw: Tensor
    ape: Tensor
    norm: Tensor
    state: Tensor
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
    arguments, sizes = c4_arguments(compressors, eps, rotations, rows, page_table, page_tokens)
    if len(rows.slots):
        _c4[(len(rows.slots), len(compressors))](*arguments, **sizes)


def c4_arguments(
    compressors: Sequence[C4Compressor],
    eps: float,
    rotations: Tensor,
    rows: Rows,
    page_table: Tensor,
    page_tokens: int,
) -> tuple[list[Tensor | int | float], dict[str, int | str]]:
    """Arguments of `_c4`, checked, and its constants."""
    arguments: list[Tensor | int | float] = []
    sizes: dict[str, int | str] = {}
    for suffix, each in zip(("", "_2"), (compressors[0], compressors[-1]), strict=True):
        dim, row_format = each.ring.shape[-1] // 4, each.row_format
        _check(each.raw, 4 * dim, rotations, row_format, dim, C4)
        stored = _stored(each.planes, row_format)
        arguments += [each.raw, each.ape, each.ring, each.norm, *stored, each.raw.stride(0)]
        block = triton.next_power_of_2(dim)
        sizes |= {f"D{suffix}": dim, f"FORMAT{suffix}": row_format.format.value, f"BLOCK{suffix}": block}
    arguments += [*_places(rows, page_table, rotations), page_table.shape[1], eps]
    sizes |= {"ROPE": 2 * rotations.shape[1], "RING": compressors[0].ring.shape[1], "PER_PAGE": page_tokens // C4}
    return arguments, sizes | {"num_warps": 4, "launch_pdl": launches_early(page_table.device)}


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
    compressor = C128Compressor(raw, ape, norm, state, planes, row_format)
    arguments, sizes = c128_arguments(compressor, eps, rotations, rows, page_table, page_tokens)
    if raw.shape[0]:
        _c128[(raw.shape[0],)](*arguments, **sizes)


def c128_arguments(
    compressor: C128Compressor, eps: float, rotations: Tensor, rows: Rows, page_table: Tensor, page_tokens: int
) -> tuple[list[Tensor | int | float], dict[str, int | str]]:
    """Arguments of `_c128`, checked, and its constants."""
    raw, ape, norm, state, planes, row_format = (getattr(compressor, field.name) for field in fields(compressor))
    dim = state.shape[-1]
    _check(raw, 2 * dim, rotations, row_format, dim, C128)
    places = _places(rows, page_table, rotations)
    arguments = [raw, ape, state, norm, *_stored(planes, row_format), *places, raw.stride(0), page_table.shape[1], eps]
    sizes = {
        "D": dim,
        "ROPE": 2 * rotations.shape[1],
        "PER_PAGE": page_tokens // C128,
        "FORMAT": row_format.format.value,
        "BANKS": state.shape[1],
        "BLOCK": triton.next_power_of_2(dim),
        "BLOCK_R": 1 if is_deterministic() else 16,
        "launch_pdl": launches_early(raw.device),
        "num_warps": 16,
    }
    return arguments, sizes


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
