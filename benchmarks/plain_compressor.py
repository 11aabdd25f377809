"""The compressors of a step as the reference's chain on a GPU: each operation of torch is a launch of its own.

Takes what `compress_c4` and `compress_c128` of kernels/compressor/triton.py take, and leaves what they leave. It never
waits for the device, so that a CUDA graph can hold it: how many entries a step closes is known there alone, so it works
on as many as could close, and what is none of them is written to the last row of a pool, which no kernel reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_kernels.compressor.reference import finish, online_update, pool_c4
from dsv4_kernels.compressor.triton import C4Compressor
from dsv4_kernels.kv_store import Format, Planes, RowFormat, encode, store
from dsv4_kernels.metadata import C4, C128, Rows
from dsv4_kernels.quant.reference import hadamard


def _compact(wanted: Tensor, most: int) -> Tensor:
    """Numbers int64 [most] of the rows that are wanted bool [rows], in order; -1 behind the last."""
    places = torch.where(wanted, wanted.cumsum(0) - 1, most)
    numbers = torch.full((most + 1,), -1, dtype=torch.int64, device=wanted.device)
    return numbers.scatter_(0, places, torch.arange(len(wanted), device=wanted.device))[:most]


def _store_entries(
    pooled: Tensor,
    rows: Tensor,  # int64 [n], the row that closes the entry; -1 = none
    is_real: Tensor,
    ratio: int,
    norm: Tensor,
    eps: float,
    rotations: Tensor,
    step: Rows,
    page_table: Tensor,
    page_tokens: int,
    planes: Planes,
    row_format: RowFormat,
) -> None:
    """Pooled values f32 [n, d] to the page rows of the entries that `rows` close, where `is_real`."""
    rows = rows.clamp_min(0)
    entry = step.positions[rows].clamp_min(0).long() // ratio
    per_page = page_tokens // ratio
    pages = page_table[step.slots[rows].clamp_min(0).long(), entry // per_page].long()
    targets = torch.where(is_real, pages * per_page + entry % per_page, len(planes[0]) - 1)
    values = finish(pooled, norm, eps, rotations[rows], torch.bfloat16)
    if row_format.format is Format.INDEX_FP4:
        values = hadamard(values).to(torch.bfloat16)
    store(planes, targets, encode(values, row_format))


def compress_c4(
    compressors: Sequence[C4Compressor],
    eps: float,
    rotations: Tensor,
    rows: Rows,
    page_table: Tensor,
    page_tokens: int,
) -> None:
    """Of one or two compressors, one after the other."""
    positions, num_rows, num_slots = rows.positions.long(), len(rows.positions), len(page_table)
    closing = _compact((positions >= 0) & (positions % C4 == C4 - 1), min(num_rows, num_rows // C4 + num_slots))
    row = closing.clamp_min(0)
    start = positions[row] - (row - rows.firsts[row])
    source = positions[row].unsqueeze(1) + torch.arange(-7, 1, device=row.device)  # positions that the entry pools
    in_step = source >= start.unsqueeze(1)
    step_row = (row.unsqueeze(1) + torch.arange(-7, 1, device=row.device)).clamp_min(0)
    for each in compressors:
        ring_rows, width = each.ring.shape[1:]
        ring = each.ring.flatten(0, 1)
        gates = each.raw[:, width // 2 :] + each.ape[positions % C4]
        raw = torch.cat([each.raw[:, : width // 2], gates], 1)
        ring_row = rows.slots[row].clamp_min(0).long().unsqueeze(1) * ring_rows + source % ring_rows
        ring_row = torch.where(source >= 0, ring_row, 0)
        history = torch.where(in_step.unsqueeze(2), raw[step_row], ring[ring_row])
        # Before the first position there is nothing: zeros, because a weight of zero still makes NaN of a NaN.
        history = torch.where((source >= 0).unsqueeze(2), history, 0.0)
        pooled = pool_c4(history, source >= 0)
        _store_entries(
            pooled, closing, closing >= 0, C4, each.norm, eps, rotations, rows, page_table, page_tokens, each.planes,
            each.row_format,
        )  # fmt: skip
        left = rows.counts + rows.firsts - torch.arange(num_rows, device=row.device)  # rows from here to the last
        last = _compact((positions >= 0) & (left <= ring_rows), min(num_rows, ring_rows * num_slots))
        kept = last.clamp_min(0)
        target = rows.slots[kept].long() * ring_rows + positions[kept] % ring_rows
        ring[torch.where(last >= 0, target, len(ring) - 1)] = raw[kept]


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
    """Of the running states: float32 [slots + 1, 1, 3, d], the last being nobody's; no drafts."""
    state = state.squeeze(1)
    positions, num_rows, num_slots = rows.positions.long(), len(rows.positions), len(page_table)
    number = torch.arange(num_rows, device=raw.device)
    # Runs of a request's rows inside one block. A step of decodes has no more rows than there are slots.
    longest, most = (1, num_rows) if num_rows <= num_slots else (C128, num_rows // C128 + 2 * num_slots)
    most = min(num_rows, most)
    first = _compact((positions >= 0) & ((number == rows.firsts) | (positions % C128 == 0)), most)
    row = first.clamp_min(0)
    in_block = positions[row] % C128
    length = torch.minimum(C128 - in_block, rows.firsts[row] + rows.counts[row] - row)
    offset = torch.arange(longest, device=raw.device)
    present = (first >= 0).unsqueeze(1) & (offset < length.unsqueeze(1))
    kv, gate = raw[row.unsqueeze(1) + torch.where(present, offset, 0)].chunk(2, dim=2)
    gate = gate + ape[(in_block.unsqueeze(1) + offset) % C128]
    slot = rows.slots[row].clamp_min(0).long()
    updated = online_update(state[slot], in_block == 0, kv, gate, present)
    closes = (first >= 0) & (in_block + length == C128)
    _store_entries(
        updated[:, 2], row + length - 1, closes, C128, norm, eps, rotations, rows, page_table, page_tokens, planes,
        row_format,
    )  # fmt: skip
    state[torch.where((first >= 0) & ~closes, slot, len(state) - 1)] = updated
