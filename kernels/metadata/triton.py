"""The index arithmetic around a step in Triton: what plan.py says in torch, in one launch each, without the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.metadata.plan import FLOATS, INPUTS, SETTINGS, StepPlan
from dsv4_kernels.metadata.rows import Rows
from dsv4_kernels.sampling.counter import number, stream_of
from dsv4_kernels.sampling.reference import COIN, DRAFT

BLOCK = 1024  # rows of a request at a time
CHUNK = 2048  # values of a row's streams at a time


@triton.jit
def _plan(
    inputs,  # int64 [inputs, requests]
    numbers,  # the same bytes as float64
    given,  # int64 [rows]
    left,  # int64 [2, slots + 1]: last tokens, accepted drafts
    each,  # int32 [6, requests]: slots, starts, counts, first rows, numbers of drafts, numbers of the requests
    ones,  # int32 [requests]
    places,
    filtered,
    temperatures,  # [requests], then [requests (2 K + 1)], as the three that follow
    top_ks,
    top_ps,
    min_ps,
    shares,
    draws,
    coins,
    proposals,
    sampling,
    wrong,
    draft_slots,
    draft_positions,
    rows,  # int32 [4, rows]: slots, positions, firsts, counts
    behind,
    ids,
    last_ids,
    num_rows,
    spare,
    K: tl.constexpr,
    COIN: tl.constexpr,
    DRAFT: tl.constexpr,
    REQUESTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a request; together they mark the rows behind the last request's."""
    wait_for_previous()
    r, num = tl.program_id(0), tl.num_programs(0)
    slot, start, count = tl.load(inputs + r), tl.load(inputs + num + r), tl.load(inputs + 2 * num + r)
    num_drafts, top_k = tl.load(inputs + 3 * num + r), tl.load(inputs + 4 * num + r)
    seed, index, follows = tl.load(inputs + 5 * num + r), tl.load(inputs + 6 * num + r), tl.load(inputs + 7 * num + r)
    temperature = tl.load(numbers + 8 * num + r).to(tl.float32)
    top_p = tl.load(numbers + 9 * num + r).to(tl.float32)
    min_p = tl.load(numbers + 10 * num + r).to(tl.float32)
    place = tl.where(count > 0, slot, spare)
    known, unseen = tl.load(left + place), tl.where(follows > 0, tl.load(left + spare + 1 + place), 0)
    start, index = start + unseen, index + unseen
    lane = tl.arange(0, REQUESTS)
    counts = tl.load(inputs + 2 * num + lane, mask=lane < num, other=0)
    first, total = tl.sum(tl.where(lane < r, counts, 0)), tl.sum(counts)

    tl.store(each + r, slot.to(tl.int32))
    tl.store(each + num + r, start.to(tl.int32))
    tl.store(each + 2 * num + r, count.to(tl.int32))
    tl.store(each + 3 * num + r, first.to(tl.int32))
    tl.store(each + 4 * num + r, num_drafts.to(tl.int32))
    tl.store(each + 5 * num + r, r)
    tl.store(ones + r, 1)
    tl.store(places + r, place)
    tl.store(filtered + r, ((top_k > 0) | (top_p < 1) | (min_p > 0)).to(tl.uint8))
    tl.store(temperatures + r, temperature)
    tl.store(top_ks + r, top_k)
    tl.store(top_ps + r, top_p)
    tl.store(min_ps + r, min_p)

    last = tl.maximum(first + count - num_drafts - 1, 0)
    of_tokens, of_coins, of_drafts = stream_of(seed, 0), stream_of(seed, COIN), stream_of(seed, DRAFT)
    for k in tl.static_range(K + 1):
        drawn = number(of_tokens, index + k)
        tl.store(draws + r * (K + 1) + k, drawn)
        tl.store(sampling + r * (K + 1) + k, last + tl.minimum(k, num_drafts))
        share = 1.0 + drawn * 0
        if k == 0:
            share = tl.where(num_drafts == 0, drawn, share)
        tl.store(shares + r * (K + 1) + k, share)
    for k in tl.static_range(2 * K + 1):
        # The rows of a request's target stand together, behind all of these those of its proposal.
        at = r * (K + 1) + k if k <= K else num * (K + 1) + r * K + k - K - 1
        tl.store(temperatures + num + at, temperature)
        tl.store(top_ks + num + at, top_k)
        tl.store(top_ps + num + at, top_p)
        tl.store(min_ps + num + at, min_p)
    for k in tl.static_range(K):
        tl.store(shares + num * (K + 1) + r * K + k, 1.0)
        tl.store(coins + r * K + k, number(of_coins, index + k))
        tl.store(proposals + k * num + r, number(of_drafts, index + k))
        tl.store(wrong + k * num + r, 0)
        tl.store(draft_slots + k * num + r, tl.where(k < num_drafts, slot, -1).to(tl.int32))
        tl.store(draft_positions + k * num + r, tl.where(k < num_drafts, start - 1 + k, -1).to(tl.int32))

    tl.store(last_ids + r, known)
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        mine, row = i < count, first + i
        position = start + i
        token = tl.load(given + row, mask=mine, other=0)
        tl.store(ids + row, tl.where(token == -1, known, token), mask=mine)
        tl.store(rows + row, tl.full([BLOCK], 0, tl.int32) + slot.to(tl.int32), mask=mine)
        tl.store(rows + num_rows + row, position.to(tl.int32), mask=mine)
        tl.store(rows + 2 * num_rows + row, tl.full([BLOCK], 0, tl.int32) + first.to(tl.int32), mask=mine)
        tl.store(rows + 3 * num_rows + row, tl.full([BLOCK], 0, tl.int32) + count.to(tl.int32), mask=mine)
        tl.store(behind + row, (position - 1).to(tl.int32), mask=mine)
    for begin in range(total + r * BLOCK, num_rows, num * BLOCK):
        row = begin + tl.arange(0, BLOCK)
        mine, none = row < num_rows, tl.full([BLOCK], -1, tl.int32)
        tl.store(ids + row, tl.full([BLOCK], 0, tl.int64), mask=mine)
        tl.store(rows + row, none, mask=mine)
        tl.store(rows + num_rows + row, none, mask=mine)
        tl.store(rows + 2 * num_rows + row, none, mask=mine)
        tl.store(rows + 3 * num_rows + row, none + 1, mask=mine)
        tl.store(behind + row, none, mask=mine)


def plan_step(inputs: Tensor, token_ids: Tensor, left: Tensor, num_drafts: int) -> StepPlan:
    """See plan.plan_step. Raises ValueError for other shapes and dtypes."""
    num, most = inputs.shape[1], num_drafts
    dtypes = {tensor.dtype for tensor in (inputs, token_ids, left)}
    if len(inputs) != len(INPUTS) or dtypes != {torch.int64} or not (inputs.is_contiguous() and left.is_contiguous()):
        raise ValueError(
            f"plan_step: inputs {list(inputs.shape)}, dtypes {dtypes}; expected contiguous int64 and {len(INPUTS)} "
            "numbers of each request"
        )
    num_rows, judged = len(token_ids), num * (2 * most + 1)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=inputs.device)

    each, ones, rows, mtp_positions = empty(6, num), empty(num), empty(4, num_rows), empty(most * num + num_rows)
    draft_positions, behind = mtp_positions[: most * num], mtp_positions[most * num :]
    places, last_ids, sampling, ids = (
        empty(*s, dtype=torch.int64) for s in ((num,), (num,), (num, most + 1), (num_rows,))
    )
    kinds = {name: torch.float32 if name in FLOATS else torch.int64 for name in SETTINGS}
    settings = {name: empty(num + judged, dtype=dtype) for name, dtype in kinds.items()}
    shares, draws, coins, proposals = (
        empty(*s, dtype=torch.float64) for s in ((judged,), (num, most + 1), (num, most), (most, num))
    )
    wrong, draft_slots, filtered = empty(most, num), empty(most, num), empty(num, dtype=torch.uint8)
    _plan[(num,)](
        inputs, inputs.view(torch.float64), token_ids, left, each, ones, places, filtered, *settings.values(),
        shares, draws, coins, proposals, sampling, wrong, draft_slots, draft_positions, rows, behind, ids, last_ids,
        num_rows, left.shape[1] - 1, K=most, COIN=COIN, DRAFT=DRAFT, REQUESTS=triton.next_power_of_2(num), BLOCK=BLOCK,
        launch_pdl=launches_early(inputs.device),
    )  # fmt: skip
    slots, starts, counts, first_rows, drafts_each, numbers = each
    passes = zip(draft_slots, draft_positions.view(most, num), strict=True)
    return StepPlan(
        slots=slots,
        places=places,
        starts=starts,
        counts=counts,
        first_rows=first_rows,
        num_drafts=drafts_each,
        is_filtered=filtered,
        settings={name: values[:num] for name, values in settings.items()},
        judged={name: values[num:] for name, values in settings.items()},
        shares=shares,
        draws=draws,
        coins=coins,
        proposals=proposals,
        sampling_rows=sampling,
        passes=tuple(Rows(slot, position, numbers, ones) for slot, position in passes),
        rows=Rows(*rows),
        behind=Rows(rows[0], behind, rows[2], rows[3]),
        mtp_positions=mtp_positions,
        ids=ids,
        last_ids=last_ids,
        num_wrong=wrong,
    )


@triton.jit
def _place(chosen, num_drafts, first_rows, ids, drafts, K: tl.constexpr):
    wait_for_previous()
    r, num = tl.program_id(0), tl.num_programs(0)
    count, first = tl.load(num_drafts + r), tl.load(first_rows + r)
    for k in tl.static_range(K):
        draft = tl.load(chosen + k * num + r)
        tl.store(drafts + r * K + k, tl.where(k < count, draft, -1))
        tl.store(ids + first + 1 + k, draft, mask=k < count)


def place_drafts(plan: StepPlan, chosen: Tensor) -> Tensor:
    """See plan.place_drafts; `chosen` is contiguous."""
    most, num = chosen.shape
    drafts = torch.empty(num, most, dtype=torch.int64, device=chosen.device)
    _place[(num,)](
        chosen, plan.num_drafts, plan.first_rows, plan.ids, drafts, K=most, num_warps=1,
        launch_pdl=launches_early(chosen.device),
    )  # fmt: skip
    return drafts


@triton.jit
def _end(
    counts,
    num_drafts,
    first_rows,
    places,
    tokens,
    bad,
    accepted,
    wrong,
    drafts,
    left,
    results,
    ends,
    banks,
    num_banks,
    spare,
    K: tl.constexpr,
):
    wait_for_previous()
    r, num = tl.program_id(0), tl.num_programs(0)
    count, first, place = tl.load(counts + r), tl.load(first_rows + r), tl.load(places + r)
    token, is_bad = tl.load(tokens + r), tl.load(bad + r) != 0
    kept, stays = count.to(tl.int64), token * 0
    width: tl.constexpr = 1 if K == 0 else 3 + K
    if K > 0:
        mine, stays = tl.load(num_drafts + r), tl.load(accepted + r)
        kept += stays - mine
        tl.store(results + r * width + 1, stays)
        num_wrong = stays * 0
        for k in tl.static_range(K):
            num_wrong += tl.where(k < mine, tl.load(wrong + k * num + r), 0)
            tl.store(results + r * width + 3 + k, tl.load(drafts + r * K + k))
        tl.store(results + r * width + 2, num_wrong)
    tl.store(results + r * width, tl.where(is_bad, -1, token))
    tl.store(left + place, token)
    tl.store(left + spare + 1 + place, stays)
    tl.store(ends + first, (first + kept - 1).to(tl.int32), mask=count > 0)
    tl.store(banks + r, tl.where((count <= num_banks) & (count > 0), kept - 1, 0))


def end_step(
    plan: StepPlan,
    left: Tensor,
    tokens: Tensor,
    is_bad: Tensor,
    num_banks: int,
    accepted: Tensor | None = None,
    drafts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See plan.end_step."""
    most = 0 if accepted is None else len(plan.passes)
    num, device = len(tokens), tokens.device
    results = torch.empty(num, 3 + most if most else 1, dtype=torch.int64, device=device)
    ends, banks = torch.empty_like(plan.rows.slots), torch.empty_like(plan.places)
    _end[(num,)](
        plan.counts, plan.num_drafts, plan.first_rows, plan.places, tokens, is_bad.view(torch.uint8), accepted,
        plan.num_wrong, drafts, left, results, ends, banks, num_banks, left.shape[1] - 1, K=most, num_warps=1,
        launch_pdl=launches_early(device),
    )  # fmt: skip
    return results, ends, banks


@triton.jit
def _shift(slots, firsts, ends, streams, stored, before, width, CHUNK: tl.constexpr):
    wait_for_previous()
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    slot, first = tl.load(slots + row).to(tl.int64), tl.load(firsts + row)
    inside = at < width
    if slot < 0:
        tl.store(before + row * width + at, tl.zeros([CHUNK], before.dtype.element_ty), mask=inside)
    elif first == row:
        # The same program reads a slot's streams and replaces them.
        tl.store(before + row * width + at, tl.load(stored + slot * width + at, mask=inside), mask=inside)
        end = tl.load(ends + row).to(tl.int64)
        tl.store(stored + slot * width + at, tl.load(streams + end * width + at, mask=inside), mask=inside)
    else:
        tl.store(before + row * width + at, tl.load(streams + (row - 1) * width + at, mask=inside), mask=inside)


def shift_streams(rows: Rows, streams: Tensor, stored: Tensor, ends: Tensor) -> Tensor:
    """See plan.shift_streams; both are contiguous."""
    before, width = torch.empty_like(streams), stored.shape[1]
    if not (streams.is_contiguous() and stored.is_contiguous() and streams[0].numel() == width):
        raise ValueError(
            f"shift_streams: streams {list(streams.shape)} with strides {streams.stride()}, stored "
            f"{list(stored.shape)}; expected contiguous rows of one width"
        )
    grid = len(streams), triton.cdiv(width, CHUNK)
    _shift[grid](
        rows.slots, rows.firsts, ends, streams, stored, before, width, CHUNK=CHUNK,
        launch_pdl=launches_early(streams.device),
    )  # fmt: skip
    return before
