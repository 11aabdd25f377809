"""The indexer in Triton: scores over pages of FP4 keys, exact top-k. Its queries: queries.py.

Rounding points are the official ones, as in the bfloat16 reference: dots, products and sums are bfloat16. A dot of FP4
vectors is exact in float32 unless their scales differ by more than 2^10, so it does not depend on its order; the sum
over heads does, and now and then another order decides its rounding. Scores are kept as int16 keys of the same order.

- Scores: a program takes some rows of one request and shares the keys that it reads between them. Even and odd elements
  of a key, the low and high nibbles of its bytes, are multiplied apart, so nothing has to be interleaved.
- Top-k: a program holds CHUNK keys in registers, finds the k-th largest bit by bit, and writes what is above it and the
  first of its equals. Where a row has more keys, each chunk leaves a list of its k best, and lists are merged, CHUNK
  candidates at a time. Candidates stay in the order of entries, so ties are right there too.

Up to ONE_LAUNCH_ROWS rows are one launch at any context: the last program of a chunk makes its list, the last of some
lists merges them (docs/adr/0007-the-last-program-finishes.md). More rows, a prefill, take a launch for scores and some
for the top-k: there the last program would choose for 16 rows one after the other, while a launch of its own
has a program for each row. In deterministic mode few rows take those launches too, so that one kernel adds up scores.

Scores take at most MAX_SCORE_BYTES (or 16 rows): more rows are taken in turns. With 64 heads a score costs 16,576
operations and two bytes, so computing it a second time instead of keeping it would be slower.
What choosing while scoring would bring: docs/adr/0011-index-scores-stay-in-memory.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.arrival import NUM_COUNTERS, counters, is_last
from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.deterministic import is_deterministic
from dsv4_kernels.kv_store import Format, Planes, RowFormat
from dsv4_kernels.metadata import C4
from dsv4_kernels.metadata.rows import Rows
from dsv4_kernels.quant.device import e2m1_values, power_of_two
from dsv4_kernels.rope.device import split_pairs

MAX_SCORE_BYTES = 256 << 20
CHUNK = 4096  # keys that a program holds to choose
SHARED_ROWS = 16  # rows of a request that share the keys they read
VERIFY_ROWS = 4  # the same in one launch, where one program chooses for all of them: the rows of a verify
ONE_LAUNCH_ROWS = 256
BLOCK_E = 128  # entries of one matrix product
LEAST_PROGRAMS = 1024  # that compute scores, if there is so much to compute


@triton.jit
def _all(chosen, visible, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The choice of a row that sees at most TOP_K entries."""
    place = tl.arange(0, BLOCK_K)
    tl.store(chosen + place, tl.where(place < visible, place, -1), mask=place < TOP_K)


@triton.jit
def _best(
    keys,  # of the row: int16 of all entries; with MERGE lists of TOP_K candidates
    ids,  # with MERGE: the candidates' entries
    new_keys,  # int16 [TOP_K], without LAST
    new_ids,  # int32 [TOP_K]
    visible,  # entries, more than TOP_K
    part,
    span,  # entries that a list stands for; without MERGE, of a part
    TOP_K: tl.constexpr,
    LISTS: tl.constexpr,  # of a part, with MERGE
    MERGE: tl.constexpr,
    LAST: tl.constexpr,  # the ids are the answer
    BLOCK: tl.constexpr,
):
    """The TOP_K best of one part of a row's keys, or of its lists, in the order of entries."""
    index = tl.arange(0, BLOCK)
    if MERGE:  # a list holds what is visible of its span, up to TOP_K
        valid = (index % TOP_K < visible - (part * LISTS + index // TOP_K) * span) & (index < LISTS * TOP_K)
        at = part * (LISTS * TOP_K) + index
    else:
        valid = (part * span + index < visible) & (index < span)
        at = part * span + index
    key = tl.where(valid, tl.load(keys + at, mask=valid, other=0).to(tl.int32) + 32768, -1)
    wanted = tl.minimum(tl.sum((key >= 0).to(tl.int32)), TOP_K)
    least = 0  # the largest key that at least `wanted` keys reach
    for turn in range(16):
        tried = least + (32768 >> turn)
        least = tl.where(tl.sum((key >= tried).to(tl.int32)) >= wanted, tried, least)
    num_equal = wanted - tl.sum((key > least).to(tl.int32))
    # Two counts in one sum: equal keys above the lower 16 bits.
    reached = tl.cumsum(tl.where(key > least, 1, tl.where(key == least, 65536, 0)), 0)
    taken = (key > least) | ((key == least) & ((reached >> 16) <= num_equal))
    place = (reached & 65535) + tl.minimum(reached >> 16, num_equal) - 1
    entry = tl.load(ids + at, mask=taken, other=0) if MERGE else at
    tl.store(new_ids + place, entry, mask=taken)
    if not LAST:
        tl.store(new_keys + place, (key - 32768).to(tl.int16), mask=taken)


@triton.jit(do_not_specialize=["first_row", "end_row"])
def _scores(
    q,  # bf16 [rows, HEADS, DIM]
    weights,  # bf16 [rows, HEADS]
    slots,
    positions,
    firsts,
    counts,
    page_table,  # int32 [slots, table_width]
    data,  # uint8 [page rows, DIM / 2]
    scales,  # uint8 [page rows, DIM / 32]
    keys,  # int16 [end_row - first_row, num_entries]
    list_keys,  # int16 [rows, num_lists, TOP_K]: of each level but the last, one behind the other
    list_ids,  # int32, the same
    chosen,  # int32 [rows, TOP_K], with LEVELS
    arrived,  # int32 [rows, num_lists + 1], with LEVELS
    first_row,
    end_row,
    table_width,
    num_entries,
    num_lists,
    span,  # entries whose programs go on together: of a list of the first level; without LEVELS all
    TOP_K: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,  # HEADS padded to a power of two, at least 16
    DIM: tl.constexpr,
    PER_PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,  # of lists, the last of which is the choice; 0: another launch chooses
    LISTS: tl.constexpr,  # that one of the next level is merged from
    BLOCK_SPAN: tl.constexpr,  # span, LISTS * TOP_K and TOP_K padded to a power of two
    BLOCK_LISTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_previous()
    row = first_row + tl.program_id(0)
    position = tl.load(positions + row)
    if position < 0:
        return
    inside = row - tl.load(firsts + row)  # the request
    if (inside % ROWS != 0) & (row != first_row):
        return  # a row before it takes this one along
    num_rows = tl.minimum(ROWS - inside % ROWS, tl.load(counts + row) - inside)
    num_rows = tl.minimum(num_rows, end_row - row)
    visible = (position + num_rows) // 4  # to the last of the rows, which see no more than four entries less
    if visible <= TOP_K:  # all are chosen
        if LEVELS > 0:  # noqa: SIM102  # a constant, then a value
            if tl.program_id(1) == 0:
                for step in range(num_rows):
                    _all(chosen + (row + step).to(tl.int64) * TOP_K, (position + step + 1) // 4, TOP_K, BLOCK_K)
        return
    # The programs are divided among the spans that the rows see.
    parts = tl.num_programs(1) // tl.cdiv(visible, span)
    number, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    start = number * span
    num_blocks = tl.cdiv(tl.minimum(visible - start, span), BLOCK)
    if (start >= visible) | (part >= num_blocks):
        return
    parts = tl.minimum(parts, num_blocks)
    end = tl.minimum(visible, start + span)
    table = page_table + tl.load(slots + row).to(tl.int64) * table_width
    head, dim = tl.arange(0, LANES), tl.arange(0, DIM)[None, :]
    group = tl.arange(0, DIM // 32)
    column = group[:, None] * 16 + tl.arange(0, 16)[None, :]  # bytes of a group of 32
    for block in range(part, num_blocks, parts):
        entry = start + block * BLOCK + tl.arange(0, BLOCK)
        exists = entry < end
        page = tl.load(table + entry // PER_PAGE, mask=exists, other=0).to(tl.int64)
        page_row = page * PER_PAGE + entry % PER_PAGE
        at = (page_row * (DIM // 2))[:, None, None] + column[None, :, :]
        codes = tl.load(data + at, mask=exists[:, None, None], other=0).to(tl.int32)
        byte = tl.load(scales + (page_row * (DIM // 32))[:, None] + group[None, :], mask=exists[:, None], other=1)
        scale = power_of_two(byte)[:, :, None]
        even = tl.reshape(e2m1_values(codes) * scale, [BLOCK, DIM // 2]).to(tl.bfloat16)
        odd = tl.reshape(e2m1_values(codes >> 4) * scale, [BLOCK, DIM // 2]).to(tl.bfloat16)
        for step in range(num_rows):
            vector = (row + step).to(tl.int64) * HEADS + head
            values = tl.load(q + (vector * DIM)[:, None] + dim, mask=(head < HEADS)[:, None], other=0.0)
            q_even, q_odd = split_pairs(values)
            dots = tl.dot(even, tl.trans(q_even))
            dots = tl.dot(odd, tl.trans(q_odd), dots)
            weight = tl.load(weights + vector, mask=head < HEADS, other=0.0)
            products = tl.maximum(dots.to(tl.bfloat16).to(tl.float32), 0.0) * weight.to(tl.float32)[None, :]
            # Adding zero makes -0 equal to 0.
            score = (tl.sum(products.to(tl.bfloat16).to(tl.float32), axis=1) + 0.0).to(tl.bfloat16)
            bits = score.to(tl.int16, bitcast=True)
            key = bits ^ ((bits >> 15) & 0x7FFF)
            line = keys + (row + step - first_row).to(tl.int64) * num_entries
            tl.store(line + entry, key, mask=exists & (entry < (position + step + 1) // 4))
    if LEVELS > 0:
        arrived += row * (num_lists + 1)
        last = is_last(arrived + number, parts)
        level_lists = tl.cdiv(num_entries, span)  # of a row, on this level
        before, from_list = 0, 0  # lists of a row on the levels before, and before those that are merged
        for level in tl.static_range(LEVELS):
            if last:
                for step in range(num_rows):
                    one, sees = (row + step).to(tl.int64), (position + step + 1) // 4
                    to = (one * num_lists + before + number) * TOP_K
                    if level > 0:
                        source, source_ids = list_keys + (one * num_lists + from_list) * TOP_K, list_ids
                        source_ids += (one * num_lists + from_list) * TOP_K
                    else:
                        source, source_ids = keys + (one - first_row) * num_entries, list_ids
                    answer = level == LEVELS - 1
                    if sees > TOP_K:
                        _best(
                            source,
                            source_ids,
                            list_keys + to,
                            chosen + one * TOP_K if answer else list_ids + to,
                            sees,
                            number,
                            span,
                            TOP_K,
                            LISTS,
                            level > 0,
                            answer,
                            BLOCK_LISTS if level > 0 else BLOCK_SPAN,
                        )
                    elif answer:
                        _all(chosen + one * TOP_K, sees, TOP_K, BLOCK_K)
                if level < LEVELS - 1:
                    width = span * LISTS if level > 0 else span
                    to_merge = tl.minimum(tl.cdiv(visible, width) - number // LISTS * LISTS, LISTS)
                    last = is_last(arrived + before + level_lists + number // LISTS, to_merge)
            if level > 0:
                span *= LISTS
            from_list = before
            before += level_lists
            level_lists = tl.cdiv(level_lists, LISTS)
            number = number // LISTS


@triton.jit
def _top_k(
    keys,  # int16 [rows, width]: of all entries; with MERGE lists of TOP_K candidates
    ids,  # int32 [rows, width], with MERGE: the candidates' entries
    positions,  # of the rows
    new_keys,  # int16 [rows, programs, TOP_K], without LAST
    new_ids,  # int32 [rows, programs, TOP_K]
    width,
    span,
    TOP_K: tl.constexpr,
    LISTS: tl.constexpr,
    MERGE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,  # TOP_K padded to a power of two
):
    """`_best` of each row and part."""
    wait_for_previous()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row)
    if position < 0:
        return
    visible = (position + 1) // 4
    to = (row * tl.num_programs(1) + part) * TOP_K
    if visible <= TOP_K:  # all are chosen; nothing has scores
        if LAST:
            _all(new_ids + to, visible, TOP_K, BLOCK_K)
        return
    if visible <= part * LISTS * span:
        return
    at = row * width
    _best(keys + at, ids + at, new_keys + to, new_ids + to, visible, part, span, TOP_K, LISTS, MERGE, LAST, BLOCK)


def select(
    q: Tensor,
    weights: Tensor,
    rows: Rows,
    planes: Planes,
    row_format: RowFormat,
    page_table: Tensor,
    page_tokens: int,
    top_k: int,
) -> Tensor:
    """The C4 entries that each row attends to: the `top_k` best scores sum_h w_h relu(q_h . k), ties to the lower id.

    Args:
        q, weights: of `prepare_queries`, contiguous.
        planes: keys of `row_format` (INDEX_FP4) by page row; row r sees entries below (positions[r] + 1) // 4.
        page_table: int32 [slots, pages]; its width times the entries of a page bounds what a row can see.

    Returns:
        Entry ids int32 [T, top_k] in ascending order, -1 after the visible ones; not written for padding rows.
        Rows that see at most `top_k` entries get all of them, unscored.

    Raises ValueError for other formats, and for a top_k above CHUNK / 2.
    """
    num_rows, num_heads, dim = q.shape
    if row_format.format is not Format.INDEX_FP4 or row_format.dim != dim or q.dtype != torch.bfloat16:
        raise ValueError(f"select: q is {list(q.shape)}, {q.dtype}, keys {row_format}; expected bfloat16 and index_fp4")
    if top_k > CHUNK // 2:
        raise ValueError(f"select: top_k is {top_k}; the kernels take at most {CHUNK // 2}")
    per_page = page_tokens // C4
    num_entries = page_table.shape[1] * per_page
    chosen = torch.empty(num_rows, top_k, device=q.device, dtype=torch.int32)
    # Whole groups of rows, so that every turn starts at an aligned address and runs the same machine code.
    groups_at_once = max(1, MAX_SCORE_BYTES // (2 * num_entries * SHARED_ROWS))
    rows_at_once = max(1, min(num_rows, groups_at_once * SHARED_ROWS))
    keys = torch.empty(rows_at_once, num_entries, device=q.device, dtype=torch.int16)
    lists = min(CHUNK // top_k, triton.cdiv(num_entries, CHUNK))
    of_levels = [triton.cdiv(num_entries, CHUNK)]
    while of_levels[-1] > 1:
        of_levels.append(triton.cdiv(of_levels[-1], lists))
    num_lists = sum(of_levels[:-1])
    one_launch = num_rows <= min(ONE_LAUNCH_ROWS, rows_at_once) and num_rows * (num_lists + 1) <= NUM_COUNTERS
    one_launch = one_launch and not is_deterministic()
    list_keys, list_ids, arrived = keys, chosen, chosen
    if one_launch:
        arrived = counters(q.device, num_rows * (num_lists + 1))
        list_keys = torch.empty(num_rows, num_lists, top_k, device=q.device, dtype=torch.int16)
        list_ids = torch.empty(num_rows, num_lists, top_k, device=q.device, dtype=torch.int32)
    span = min(CHUNK, num_entries) if one_launch else num_entries
    for first in range(0, num_rows, rows_at_once):
        end = min(first + rows_at_once, num_rows)
        splits = min(triton.cdiv(num_entries, BLOCK_E), max(8, triton.cdiv(LEAST_PROGRAMS, end - first)))
        if one_launch or num_entries > top_k:
            _scores[(end - first, max(splits, triton.cdiv(num_entries, span)))](
                q,
                weights,
                rows.slots,
                rows.positions,
                rows.firsts,
                rows.counts,
                page_table,
                *planes,
                keys,
                list_keys,
                list_ids,
                chosen,
                arrived,
                first,
                end,
                page_table.shape[1],
                num_entries,
                num_lists,
                span,
                TOP_K=top_k,
                HEADS=num_heads,
                LANES=max(16, triton.next_power_of_2(num_heads)),
                DIM=dim,
                PER_PAGE=per_page,
                ROWS=VERIFY_ROWS if one_launch else SHARED_ROWS,
                BLOCK=BLOCK_E,
                LEVELS=len(of_levels) if one_launch else 0,
                LISTS=lists,
                BLOCK_SPAN=triton.next_power_of_2(min(CHUNK, num_entries)),
                BLOCK_LISTS=triton.next_power_of_2(lists * top_k),
                BLOCK_K=triton.next_power_of_2(top_k),
                num_warps=8,
                launch_pdl=launches_early(q.device),
            )
        if not one_launch:
            _choose(keys, rows.positions[first:end], chosen[first:end], num_entries)
    return chosen


def _choose(keys: Tensor, positions: Tensor, chosen: Tensor, num_entries: int) -> None:
    """The best of each row's keys int16 [rows, num_entries], exactly, into `chosen` int32 [rows, top_k]."""
    num_rows, top_k = chosen.shape
    ids, merge, lists, span = chosen, False, 1, min(num_entries, CHUNK)
    num_lists = triton.cdiv(num_entries, span)
    while True:
        programs = triton.cdiv(num_lists, lists)
        new_keys, new_ids = keys, chosen
        if programs > 1:
            new_keys = torch.empty(num_rows, programs * top_k, device=keys.device, dtype=torch.int16)
            new_ids = torch.empty(num_rows, programs * top_k, device=keys.device, dtype=torch.int32)
        block = triton.next_power_of_2(lists * top_k if merge else span)
        _top_k[(num_rows, programs)](
            keys,
            ids,
            positions,
            new_keys,
            new_ids,
            keys.shape[1],
            span,
            TOP_K=top_k,
            LISTS=lists,
            MERGE=merge,
            LAST=programs == 1,
            BLOCK=block,
            BLOCK_K=triton.next_power_of_2(top_k),
            num_warps=max(4, min(16, block // 512)),
            launch_pdl=launches_early(keys.device),
        )
        if programs == 1:
            return
        keys, ids, merge = new_keys, new_ids, True
        span, num_lists = span * lists, programs
        lists = min(CHUNK // top_k, num_lists)
