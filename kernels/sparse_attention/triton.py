"""Sparse attention in Triton on rows as the cache stores them (Format.KV_FP8): decode, verify and prefill alike.

Equal to `sparse_attention` of the reference over the window (ring rows and step rows) and the compressed entries (page
rows).

A program takes one row of the step, up to 64 of its heads, and one of `num_splits` parts of its keys. A block of 64
keys is dequantised once and serves as K and as V. Keys have one order, the window, then entries, cut into blocks; a
split is a run of blocks, so the number of splits decides only where partial results are added.

Everything a program needs stays in registers and shared memory by a hair (tests/kernels/test_compile_gate.py): rows
come in two halves of their dims, so that one is dequantised while the other waits, and nothing is hoisted out of loops.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels import capability
from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.deterministic import is_deterministic
from dsv4_kernels.kv_store.reference import KV_GROUP, SCALE_ALIGN, Planes
from dsv4_kernels.metadata.rows import Rows
from dsv4_kernels.quant.device import power_of_two
from dsv4_kernels.rope.device import rotate
from dsv4_kernels.sparse_attention.device import key_blocks
from dsv4_kernels.sparse_attention.hopper import attend_specialized

KEYS = 64  # keys of a block
HEADS = 64  # most heads of a program: the rows of a wgmma tile
LEAST_HEADS = 16  # of the smallest tile that tl.dot takes; heads beyond the model's are padding
PROGRAMS = 128  # keys are split while there are fewer: about one per SM, because shared memory admits one
# Triton 3.6 fails on loads that run ahead in a loop around tcgen05 products; 3.9 does not, between them is not tested.
RUN_AHEAD_TCGEN05 = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
FEW_BLOCKS = 3  # of keys, which one program reads in about the time of the launch that would add parts (predicted)
COPIED = 16  # values of queries that are copied at once, so their rows are that many apart, or a multiple
PARTS = 8  # partial results that `_combine` adds at a time


@triton.jit
def _half(data, scales, visible, FIRST: tl.constexpr, GROUPS: tl.constexpr, LAST: tl.constexpr, GROUP: tl.constexpr):
    """bf16 [keys, GROUPS * GROUP]: scale groups FIRST.. of stored rows. Group LAST has bf16 values, the others e4m3.

    data: pointers [keys] to the rows' bytes; scales: int64 [keys], the eight scale bytes of each; 0 where not visible.
    """
    group, lane = FIRST + tl.arange(0, GROUPS), tl.arange(0, GROUP)
    keep = visible[:, None, None] & (group < LAST)[None, :, None]
    codes = tl.load(data[:, None, None] + (group[:, None] * GROUP + lane[None, :])[None, :, :], mask=keep, other=0)
    exponent = (scales[:, None] >> (8 * group)[None, :]).to(tl.int32) & 255
    factor = power_of_two(exponent)[:, :, None]
    values = (codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * factor).to(tl.bfloat16)
    if FIRST + GROUPS > LAST:
        tail = (data + LAST * GROUP).to(tl.pointer_type(tl.bfloat16))
        tail = tl.load(tail[:, None] + lane[None, :], mask=visible[:, None], other=0.0)
        values = tl.where((group == LAST)[None, :, None], tail[:, None, :], values)
    return tl.reshape(values, [data.shape[0], GROUPS * GROUP])


@triton.jit
def _attend_block(
    data,
    scale,
    visible,
    q_low,
    q_high,
    state,
    score_scale,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    TURNED: tl.constexpr,
):
    """The running softmax `state` (top, total, low, high) with one more block of keys."""
    top, total, low, high = state
    scales = tl.load(scale.to(tl.pointer_type(tl.int64)), mask=visible, other=0)
    k_low = _half(data, scales, visible, 0, GROUPS, 2 * GROUPS - 1, GROUP)
    k_high = _half(data, scales, visible, GROUPS, GROUPS, 2 * GROUPS - 1, GROUP)
    scores = tl.dot(q_low, tl.trans(k_low))
    scores = tl.dot(q_high, tl.trans(k_high), scores) * score_scale
    scores = tl.where(visible[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    weights = weights.to(tl.bfloat16)
    if TURNED:
        low = tl.dot(tl.trans(k_low), tl.trans(weights), low * shrink[None, :])
        high = tl.dot(tl.trans(k_high), tl.trans(weights), high * shrink[None, :])
    else:
        low = tl.dot(weights, k_low, low * shrink[:, None])
        high = tl.dot(weights, k_high, high * shrink[:, None])
    return new_top, total, low, high


@triton.jit(do_not_specialize=["num_splits"])
def _attend(
    q,  # bf16 [rows, NUM_HEADS, DIM], stride q_row
    sink,  # f32 [NUM_HEADS]
    rotations,  # f32 [rows, ROPE / 2, 2]
    slots,
    positions,
    firsts,
    step_data,  # planes of KV_FP8: uint8 [.., DIM + ROPE] and [.., SCALES]
    step_scale,
    ring_data,
    ring_scale,
    entry_data,
    entry_scale,
    page_table,  # int32 [slots, num_pages]
    chosen,  # int32 [rows, num_chosen], with CHOSEN
    out,  # bf16 [rows, NUM_HEADS, DIM], without SPLIT
    partial,  # f32 [rows, num_splits, NUM_HEADS, DIM], with SPLIT
    partial_top,  # f32 [rows, num_splits, NUM_HEADS], in units of log2
    partial_total,
    q_row,
    num_pages,
    num_chosen,
    num_splits,
    score_scale,  # of scores, times log2(e)
    # What a model or a server has one value of is a constant: registers are short.
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    SCALES: tl.constexpr,
    WINDOW: tl.constexpr,
    RING: tl.constexpr,
    RATIO: tl.constexpr,
    PER_PAGE: tl.constexpr,
    CHOSEN: tl.constexpr,
    SPLIT: tl.constexpr,
    TURNED: tl.constexpr,  # value product with dims, not heads, as the rows of its tile
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    wait_for_previous()
    HALF: tl.constexpr = DIM // 2
    GROUPS: tl.constexpr = HALF // ROPE
    DATA: tl.constexpr = DIM + ROPE
    WINDOW_BLOCKS: tl.constexpr = (WINDOW + KEYS - 1) // KEYS
    head_blocks: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    row = tl.program_id(0) // head_blocks
    first_head = tl.program_id(0) % head_blocks * HEADS
    split = tl.program_id(1)
    position, slot = tl.load(positions + row), tl.load(slots + row)
    start = position - (row - tl.load(firsts + row))  # position of the request's first row of the step
    first, last = key_blocks(position, num_chosen, split, num_splits, RATIO, CHOSEN, WINDOW_BLOCKS, KEYS)

    head = tl.arange(0, HEADS)
    inside = (head < (HEADS if NUM_HEADS % HEADS == 0 else NUM_HEADS - first_head)) & (first < last)
    tile = head[:, None] * DIM + tl.arange(0, HALF)[None, :]
    q_at = q + (row.to(tl.int64) * q_row + first_head * DIM) + tile
    q_low = tl.load(q_at, mask=inside[:, None], other=0.0)
    q_high = tl.load(q_at + HALF, mask=inside[:, None], other=0.0)
    # The sink is the first key, of the first split, and has no value. A sink of -inf is none.
    top = tl.maximum(tl.load(sink + first_head + head, mask=inside, other=0.0) * 1.4426950408889634, -1e30)
    total = tl.where(split == 0, tl.full([HEADS], 1.0, tl.float32), 0.0)
    low = tl.zeros([HALF, HEADS] if TURNED else [HEADS, HALF], tl.float32)
    state = top, total, low, low
    for block in tl.range(first, tl.minimum(last, WINDOW_BLOCKS), disable_licm=True):
        key = block * KEYS + tl.arange(0, KEYS)
        at = position - WINDOW + 1 + key
        own = at >= start
        visible = (at >= 0) & (key < WINDOW)
        index = tl.where(own, row - position + at, slot * RING + at % RING).to(tl.int64)
        data = tl.multiple_of(tl.where(own, step_data, ring_data), 16) + index * DATA
        scale = tl.multiple_of(tl.where(own, step_scale, ring_scale), 8) + index * SCALES
        state = _attend_block(data, scale, visible, q_low, q_high, state, score_scale, GROUPS, ROPE, TURNED)
    if RATIO > 0:
        for block in tl.range(tl.maximum(first, WINDOW_BLOCKS), last, disable_licm=True):
            entry = (block - WINDOW_BLOCKS) * KEYS + tl.arange(0, KEYS)
            if CHOSEN:
                entry = tl.load(chosen + row.to(tl.int64) * num_chosen + entry, mask=entry < num_chosen, other=-1)
                visible = entry >= 0
            else:
                visible = entry < (position + 1) // RATIO
            page = tl.load(page_table + slot.to(tl.int64) * num_pages + entry // PER_PAGE, mask=visible, other=0)
            index = (page * PER_PAGE + entry % PER_PAGE).to(tl.int64)
            data, scale = entry_data + index * DATA, entry_scale + index * SCALES
            state = _attend_block(data, scale, visible, q_low, q_high, state, score_scale, GROUPS, ROPE, TURNED)

    top, total, low, high = state
    if TURNED:
        low, high = tl.trans(low), tl.trans(high)
    row = row.to(tl.int64)
    if not SPLIT:
        out_at = out + (row * NUM_HEADS + first_head) * DIM + tile
        tl.store(out_at, (low / total[:, None]).to(tl.bfloat16), mask=inside[:, None])
        values = (high / total[:, None]).to(tl.bfloat16)
        tl.store(out_at + HALF, rotate(values, rotations + row * ROPE, ROPE, INVERSE=True), mask=inside[:, None])
    else:
        part = (row * num_splits + split) * NUM_HEADS + first_head
        tl.store(partial + part * DIM + tile, low, mask=inside[:, None])
        tl.store(partial + part * DIM + HALF + tile, high, mask=inside[:, None])
        tl.store(partial_top + part + head, top, mask=inside)
        tl.store(partial_total + part + head, total, mask=inside)


@triton.jit(do_not_specialize=["num_splits"])
def _combine(
    partial,
    partial_top,
    partial_total,
    rotations,
    positions,
    out,
    num_heads,
    num_chosen,
    num_splits,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    CHOSEN: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One head of one row: the splits that had keys, added on a common maximum."""
    wait_for_previous()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row)
    WINDOW_BLOCKS: tl.constexpr = (WINDOW + KEYS - 1) // KEYS
    dim = tl.arange(0, DIM)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([DIM], tl.float32)
    for block in range(tl.cdiv(num_splits, PARTS)):
        split = block * PARTS + tl.arange(0, PARTS)
        first, last = key_blocks(position, num_chosen, split, num_splits, RATIO, CHOSEN, WINDOW_BLOCKS, KEYS)
        used = (split < num_splits) & (first < last)
        part = (row * num_splits + split) * num_heads + head
        tops = tl.load(partial_top + part, mask=used, other=float("-inf"))
        new_top = tl.maximum(top, tl.maximum(tl.max(tops), -1e30))
        weights = tl.exp2(tops - new_top)
        shrink = tl.exp2(top - new_top)
        values = tl.load(partial + part[:, None] * DIM + dim[None, :], mask=used[:, None], other=0.0)
        acc = acc * shrink + tl.sum(values * weights[:, None], axis=0)
        total = total * shrink + tl.sum(weights * tl.load(partial_total + part, mask=used, other=0.0))
        top = new_top
    values = rotate((acc / total).to(tl.bfloat16)[None, :], rotations + row * ROPE, ROPE, INVERSE=True)
    tl.store(out + (row * num_heads + head) * DIM + dim[None, :], values, mask=position >= 0)


def default_splits(num_rows: int, num_heads: int, num_keys: int) -> int:
    """Splits that fill a GPU: from shapes alone, `num_keys` being the most that a row could have.

    One of few blocks, and in deterministic mode. Parts of a row take 256 KB a split on Pro, so the many rows of a
    prefill cannot have several; and one program has no registers to add up parts itself.
    """
    blocks = triton.cdiv(num_keys, KEYS)
    if is_deterministic() or blocks <= FEW_BLOCKS:
        return 1
    return max(1, min(PROGRAMS // max(1, num_rows * triton.cdiv(num_heads, HEADS)), blocks))


def sparse_attention(
    q: Tensor,
    rows: Rows,
    step_planes: Planes,
    ring_planes: Planes,
    ring_rows: int,
    window: int,
    sink: Tensor,
    rotations: Tensor,
    entry_planes: Planes | None = None,
    page_table: Tensor | None = None,
    ratio: int = 0,
    page_tokens: int = 256,
    chosen: Tensor | None = None,
    out: Tensor | None = None,
    num_splits: int | None = None,
    turned: bool | None = None,
    specialized: bool | None = None,
) -> Tensor:
    """Attention over the window, compressed entries and a sink, then inverse RoPE (docs/model.md section 4).

    Args:
        q: bf16 [T, heads, head_dim] with RoPE applied, rows of any stride.
        rows: of the step; a row attends to the last `window` positions up to its own, those of its request's rows in
            this step from `step_planes` [T, bytes], those before from `ring_planes` [slots * ring_rows, bytes].
        sink: f32 [heads]; rotations: complex64 [T, 32] at the rows' positions.
        entry_planes: [pages * page_tokens / ratio, bytes] behind `page_table` int32 [slots, pages]; None with ratio 0.
        chosen: int32 [T, k], ids of entries that a row attends to, -1 for none; all visible ones when None.
        out: bf16 [T, heads, head_dim] contiguous; its padding rows are as they were.
        num_splits: parts of a row's keys that run beside each other, `default_splits` when None. Fixed, it makes a
            row's bits independent of the step.
        turned: of the Triton kernel, dims as the rows of the value product's tile; when None as the GPU wants it:
            tcgen05 has no room for an accumulator with 64 rows of heads, and fewer than 64 heads fill no wgmma tile.
        specialized: by the kernel whose warps have roles (hopper.py); when None wherever there is one, on Hopper for a
            multiple of 64 heads of 512 dims in rows whose stride is a multiple of 16.

    Returns `out`. All planes are KV_FP8. Raises ValueError for other head sizes than powers of two from 128 to 512.
    """
    num_rows, num_heads, dim = q.shape
    if dim not in (128, 256, 512) or 2 * rotations.shape[-1] != KV_GROUP or q.stride()[1:] != (dim, 1):
        raise ValueError(
            f"sparse_attention: q is {list(q.shape)}, {2 * rotations.shape[-1]} dims rotated; the Triton kernels take "
            f"neighbouring heads of 128, 256 or 512 dims, {KV_GROUP} rotated"
        )
    has_roles = num_heads % HEADS == 0 and dim == 512 and q.stride(0) % COPIED == 0
    if specialized is None:
        specialized = has_roles and capability.is_hopper(q.device)
    if specialized and not has_roles:
        raise ValueError(
            f"sparse_attention: q is {list(q.shape)}, its rows {q.stride(0)} values apart; warps with roles take "
            f"multiples of 64 heads of 512 in rows that are a multiple of {COPIED} apart"
        )
    if ratio and (entry_planes is None or page_table is None):
        raise ValueError(f"sparse_attention: ratio {ratio} needs entry_planes and page_table")
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype) if out is None else out
    if not num_rows:
        return out
    heads = min(HEADS, max(LEAST_HEADS, triton.next_power_of_2(num_heads)))
    if turned is None:
        turned = heads < HEADS or (q.is_cuda and torch.cuda.get_device_capability(q.device)[0] >= 10)
    num_chosen = 0 if chosen is None else chosen.shape[1]
    per_page = page_tokens // ratio if ratio else 1
    if num_splits is None:
        most = page_table.shape[1] * per_page if page_table is not None else 0
        num_splits = default_splits(num_rows, num_heads, window + (num_chosen if chosen is not None else most))
    partial = q.new_empty((num_rows, num_splits, num_heads, dim) if num_splits > 1 else (0,), dtype=torch.float32)
    partial_top = q.new_empty(partial.shape[:-1], dtype=torch.float32)
    partial_total = torch.empty_like(partial_top)
    turns = torch.view_as_real(rotations)
    constants = {"DIM": dim, "ROPE": KV_GROUP, "WINDOW": window, "RATIO": ratio, "CHOSEN": chosen is not None}
    arguments = (
        q,
        sink,
        turns,
        rows.slots,
        rows.positions,
        rows.firsts,
        *step_planes,
        *ring_planes,
        *(step_planes if entry_planes is None else entry_planes),
        rows.slots if page_table is None else page_table,
        rows.slots if chosen is None else chosen,
        out,
        partial,
        partial_top,
        partial_total,
        q.stride(0),
        0 if page_table is None else page_table.stride(0),
        num_chosen,
        num_splits,
        dim**-0.5 * math.log2(math.e),
    )
    of_kernel = constants | {"NUM_HEADS": num_heads, "SCALES": SCALE_ALIGN, "RING": ring_rows, "PER_PAGE": per_page}
    of_kernel |= {"SPLIT": num_splits > 1, "launch_pdl": launches_early(q.device)}
    grid = (num_rows * triton.cdiv(num_heads, heads), num_splits)
    if specialized:
        num_tiles = math.prod(grid)
        num_programs = min(num_tiles, capability.num_multiprocessors(q.device))
        attend_specialized[(num_programs,)](*arguments, num_tiles, num_warps=8, **of_kernel)
    else:
        _attend[grid](
            *arguments,
            TURNED=turned,
            HEADS=heads,
            KEYS=KEYS,
            num_warps=4 if dim == 128 else 8,
            num_stages=1 if turned and heads == HEADS and not RUN_AHEAD_TCGEN05 else 2,
            **of_kernel,
        )
    if num_splits > 1:
        _combine[(num_rows, num_heads)](
            partial,
            partial_top,
            partial_total,
            turns,
            rows.positions,
            out,
            num_heads,
            num_chosen,
            num_splits,
            KEYS=KEYS,
            PARTS=PARTS,
            num_warps=4,
            **constants,
            launch_pdl=launches_early(q.device),
        )
    return out
