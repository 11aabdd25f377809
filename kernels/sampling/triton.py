"""Sampling in Triton: `sample` of the reference without a sort and without the host, three launches for any settings.

Probabilities relative to the largest are whole numbers of units, 2^45 of them for the largest: sums of units are exact
in any order, so a row has the same draw in any batch, and no mass is lost between two passes.

1. `_scan` finds the largest logit of every chunk and the mass of the chunk relative to it. Then the last program of a
   row knows the token of a greedy row. For a row with filters it bounds the distance from the largest logit within
   which all answers lie (`_cut`).
2. `_weigh` draws for a row without filters, from one chunk. Of a row with filters it makes a histogram of the distances
   within the bound: units and, for top-k, tokens. What filters keep is a prefix of the order (distance, id), and its
   end, like the token that the random number meets, is where a count or a sum of units passes a target. The last
   program of a row knows in which few bins each of them lies (`_narrow`).
3. `_settle` lists the tokens of these bins, and its last program finds the answers among them (`_draw`).

Programs of rows that are done leave at once. The list is as long as it must be: some tens of tokens of most rows,
hundreds of a flat one, all of a row whose logits are equal.

Programs of a row meet by `is_last`. What they store or add before it, the last one sees; its own loads of it stand
behind `is_last`. What a launch leaves to the next one needs nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.arrival import counters, is_last
from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.sampling.scan import _chunk_masses, _draw_by_id, _has_k, _scan
from dsv4_kernels.sampling.search import (
    BINS,
    _bins,
    _crossing,
    _distance,
    _find,
    _inverse,
    _likely,
    _nearer,
    _nth,
    _quotient,
    _target,
    _units,
)

CHUNK = 4096  # tokens of one program of `_scan`
TURN = 2048  # tokens of one turn of a program of `_weigh` and `_settle`, whose results do not depend on it
BLOCK = 512  # listed tokens that are searched at a time
PROGRAMS = 2048  # of `_weigh` and `_settle`, about, for many rows: those that leave at once cost time too
PLAN = 16  # numbers of a row's plan, of which 13 are used


@triton.jit
def _before(bins, table, end):
    """What lies in the bins before `end`."""
    return tl.sum(tl.where(bins < end, table, 0))


@triton.jit
def _narrow(units_table, count_table, total, scale, top_k, top_p, min_p, share, has_k, plan):
    """Store in which bins the answers lie, and what lies before these.

    Each depends on the one before: the mass that top-k keeps, where top-p crosses in it, what min-p leaves, what the
    random number meets. Of each the least and the most is known, so the bins of the next.
    """
    bins = tl.arange(0, BINS)
    units = tl.load(units_table + bins)
    sums = tl.cumsum(units, axis=0)
    inside = tl.sum(units)
    k_bin, least, most = share.to(tl.int32) * 0 + BINS, total, total
    if has_k:
        counts = tl.load(count_table + bins)
        k_bin = tl.sum((tl.cumsum(counts, axis=0) < top_k).to(tl.int32))
        least, most = _before(bins, units, k_bin), _before(bins, units, k_bin + 1)
        tl.store(plan + 1, top_k - _before(bins, counts, k_bin))
        tl.store(plan + 2, least)
    tl.store(plan, k_bin)
    tl.store(plan + 3, tl.where(has_k, inside, total))  # if the k-th token has no units, or min-p ends before it
    p_first, p_last = k_bin * 0 + BINS, k_bin * 0 + BINS
    if top_p < 1:
        p_first = tl.sum((sums <= _crossing(top_p, least)).to(tl.int32))
        p_last = tl.sum((sums <= _crossing(top_p, most)).to(tl.int32))
        least, most = _before(bins, units, p_first), _before(bins, units, p_last + 1)
        tl.store(plan + 6, least)
    tl.store(plan + 4, p_first)
    tl.store(plan + 5, p_last)
    m_first, m_last = k_bin * 0 + BINS, k_bin * 0 + BINS
    if min_p > 0:
        edge = -tl.log(min_p)  # in which 1e-4 is for rounding
        m_first = _bins(tl.maximum(edge - 1e-4, 0.0), scale)
        m_last = _bins(tl.maximum(edge + 1e-4, 0.0), scale)
        likely = _before(bins, units, m_first)
        least, most = tl.minimum(least, likely), tl.minimum(most, _before(bins, units, m_last + 1))
        tl.store(plan + 9, likely)
    tl.store(plan + 7, m_first)
    tl.store(plan + 8, m_last)
    first = tl.sum((sums <= _target(share, tl.maximum(least, 35184372088832))).to(tl.int32))
    last = tl.sum((sums <= _target(share, tl.maximum(most, 35184372088832))).to(tl.int32))
    tl.store(plan + 10, first)
    tl.store(plan + 11, last)
    tl.store(plan + 12, _before(bins, units, first))


@triton.jit
def _weigh(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    uniforms,
    peaks,
    masses,
    bounds,
    part_masses,  # int64 [rows, programs]
    units_table,
    count_table,
    plans,  # int64 [rows, PLAN]
    drawn,
    arrived,
    vocab,
    row_step,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TURN: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PLAN: tl.constexpr,
):
    wait_for_previous()
    row, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    top, cut = tl.load(bounds + row * 2), tl.load(bounds + row * 2 + 1)
    temperature = tl.load(temperatures + row)
    if (cut == 0) & (part == 0):
        inverse, share = _inverse(temperature), tl.load(uniforms + row)
        peak, mass, relative = _chunk_masses(peaks, masses, row, num_chunks, top, inverse, CHUNKS)
        values = logits + row * row_step
        token = _draw_by_id(values, vocab, peak, mass, relative, inverse, share, CHUNK, CHUNKS)
        tl.store(drawn + row, tl.minimum(token, vocab - 1))
    if cut > 0:
        top_k = tl.load(top_ks + row)
        has_k = _has_k(top_k, vocab)
        scale = BINS / cut
        all_units = tl.zeros([TURN // 4], tl.int64)
        for start in range(part * TURN, vocab, num_parts * TURN):
            tokens = start + tl.arange(0, TURN)
            logit = tl.load(logits + row * row_step + tokens, mask=tokens < vocab, other=float("-inf"))
            distance = _distance(logit, top, temperature)
            units = _units(distance)
            all_units += tl.sum(tl.reshape(units, [TURN // 4, 4]), axis=1)  # of one thread
            near, bin_ = distance <= cut, _bins(distance, scale)
            # Integers, so the order in which programs add does not show.
            tl.atomic_add(units_table + row * BINS + bin_, units, mask=near, sem="relaxed")
            if has_k:
                ones = tl.full([TURN], 1, tl.int32)
                tl.atomic_add(count_table + row * BINS + bin_, ones, mask=near, sem="relaxed")
        tl.store(part_masses + row * num_parts + part, tl.sum(all_units))
        if is_last(arrived + row, num_parts):
            parts = tl.arange(0, PROGRAMS)
            total = tl.sum(tl.load(part_masses + row * num_parts + parts, mask=parts < num_parts, other=0))
            top_p, min_p, share = tl.load(top_ps + row), tl.load(min_ps + row), tl.load(uniforms + row)
            tables, plan = (units_table + row * BINS, count_table + row * BINS), plans + row * PLAN
            _narrow(*tables, total, scale, top_k, top_p, min_p, share, has_k, plan)


@triton.jit
def _draw(logits, ids, num, top, temperature, scale, top_p, min_p, share, plan, BLOCK: tl.constexpr):
    """The token that the random number meets, from the list of all tokens in the bins of the plan."""
    k_bin, limit = tl.load(plan).to(tl.int32), tl.load(plan + 3)
    if k_bin < BINS:
        rank, base = tl.load(plan + 1) - 1, tl.load(plan + 2)
        bits = _find(logits, ids, num, top, temperature, scale, k_bin, k_bin, rank, True, BLOCK)
        count, units, one, _, _ = _nearer(logits, ids, num, top, temperature, scale, k_bin, k_bin, bits, BLOCK)
        limit = base + units + (rank + 1 - count) * one
    kept = limit
    if min_p > 0:
        first, base = tl.load(plan + 7).to(tl.int32), tl.load(plan + 9)
        kept = tl.minimum(kept, base + _likely(logits, ids, num, top, temperature, scale, first, min_p, BLOCK))
    first, last = tl.load(plan + 4).to(tl.int32), tl.load(plan + 5).to(tl.int32)
    if first < BINS:
        base = tl.load(plan + 6)
        rest = _crossing(top_p, limit) - base
        bits = _find(logits, ids, num, top, temperature, scale, first, last, rest, False, BLOCK)
        _, units, one, _, _ = _nearer(logits, ids, num, top, temperature, scale, first, last, bits, BLOCK)
        kept = tl.minimum(kept, base + units + (_quotient(rest - units, one) + 1) * one)
    first, last = tl.load(plan + 10).to(tl.int32), tl.load(plan + 11).to(tl.int32)
    rest = _target(share, tl.maximum(kept, 35184372088832)) - tl.load(plan + 12)
    bits = _find(logits, ids, num, top, temperature, scale, first, last, rest, False, BLOCK)
    _, units, one, equal, token = _nearer(logits, ids, num, top, temperature, scale, first, last, bits, BLOCK)
    if equal > 1:
        rank = _quotient(rest - units, one)
        token = _nth(logits, ids, num, top, temperature, scale, bits, rank, BLOCK)
    return token


@triton.jit
def _within(bins, first, last):
    """Which bins are `first` to `last`, where these are at least one."""
    return (bins - first).to(tl.uint32) <= (last - first).to(tl.uint32)


@triton.jit
def _settle(
    logits,
    temperatures,
    top_ps,
    min_ps,
    uniforms,
    bounds,
    plans,
    ids,  # int32 [rows, vocab]: listed tokens of a row
    num_listed,
    drawn,
    arrived,
    vocab,
    row_step,
    TURN: tl.constexpr,
    BLOCK: tl.constexpr,
    PLAN: tl.constexpr,
):
    wait_for_previous()
    row, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    top, cut = tl.load(bounds + row * 2), tl.load(bounds + row * 2 + 1)
    if cut > 0:
        temperature, scale, plan = tl.load(temperatures + row), BINS / cut, plans + row * PLAN
        k_bin = tl.load(plan).to(tl.int32)
        p_first, p_last = tl.load(plan + 4).to(tl.int32), tl.load(plan + 5).to(tl.int32)
        m_first, m_last = tl.load(plan + 7).to(tl.int32), tl.load(plan + 8).to(tl.int32)
        first, last = tl.load(plan + 10).to(tl.int32), tl.load(plan + 11).to(tl.int32)
        for start in range(part * TURN, vocab, num_parts * TURN):
            tokens = start + tl.arange(0, TURN)
            logit = tl.load(logits + row * row_step + tokens, mask=tokens < vocab, other=float("-inf"))
            distance = _distance(logit, top, temperature)
            bin_ = _bins(distance, scale)
            chosen = _within(bin_, first, last) | _within(bin_, p_first, p_last)
            chosen = (chosen | _within(bin_, m_first, m_last) | (bin_ == k_bin)) & (distance <= cut)
            num = tl.sum(chosen.to(tl.int32))
            if num > 0:  # in few turns
                # In any order: what is searched for in the list does not depend on it.
                place = tl.atomic_add(num_listed + row, num, sem="relaxed") - 1
                tl.store(ids + row * vocab + place + tl.cumsum(chosen.to(tl.int32), axis=0), tokens, mask=chosen)
        if is_last(arrived + row, num_parts):
            top_p, min_p, share = tl.load(top_ps + row), tl.load(min_ps + row), tl.load(uniforms + row)
            listed, num = ids + row * vocab, tl.load(num_listed + row)
            token = _draw(
                logits + row * row_step, listed, num, top, temperature, scale, top_p, min_p, share, plan, BLOCK
            )
            tl.store(drawn + row, token.to(tl.int64))


def sample(
    logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token per row, as `sample` of the reference does with the same arguments.

    Returns int64 [B] and bool [B]: rows whose maximum is NaN or infinite, of which the token means nothing. Nothing is
    read back to the host. Raises ValueError for other dtypes and for more than 2^17 tokens.
    """
    num_rows, vocab = logits.shape
    expected = (torch.float32, torch.float32, torch.int64, torch.float32, torch.float32, torch.float64)
    given = tuple(tensor.dtype for tensor in (logits, temperature, top_k, top_p, min_p, uniform))
    if given != expected or vocab > 1 << 17 or logits.stride(1) != 1:
        raise ValueError(
            f"sample: logits {list(logits.shape)} with strides {logits.stride()}; logits, temperature, top_k, top_p, "
            f"min_p, uniform are {given}; expected {expected}, at most 2^17 tokens and stride 1"
        )

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, *shape, device=logits.device, dtype=dtype)

    drawn, bad = empty(dtype=torch.int64), empty(dtype=torch.uint8)
    if not num_rows:
        return drawn, bad.view(torch.bool)
    num_chunks = triton.cdiv(vocab, CHUNK)
    num_parts = min(triton.cdiv(vocab, TURN), triton.cdiv(PROGRAMS, num_rows))
    peaks, masses = (empty(num_chunks, dtype=torch.float32) for _ in range(2))
    near, places = empty(num_chunks, CHUNK // 128, dtype=torch.float32), empty(num_chunks, dtype=torch.int32)
    tables = empty(BINS.value, dtype=torch.int64), empty(BINS.value, dtype=torch.int32)
    bounds, num_listed = empty(2, dtype=torch.float32), empty(dtype=torch.int32)
    part_masses, plans = empty(num_parts, dtype=torch.int64), empty(PLAN, dtype=torch.int64)
    ids = empty(vocab, dtype=torch.int32)
    filters, row_step = (top_p, min_p, uniform), logits.stride(0)
    arrived = counters(logits.device, num_rows)
    sizes = {"CHUNK": CHUNK, "CHUNKS": triton.next_power_of_2(num_chunks), "num_warps": 8}
    _scan[(num_rows, num_chunks)](
        logits, temperature, top_k, top_p, min_p, peaks, places, masses, near, *tables, num_listed, bounds, drawn, bad,
        arrived, vocab, row_step, BINS_EACH=triton.next_power_of_2(triton.cdiv(BINS.value, num_chunks)), **sizes,
        launch_pdl=launches_early(logits.device),
    )  # fmt: skip
    _weigh[(num_rows, num_parts)](
        logits, temperature, top_k, *filters, peaks, masses, bounds, part_masses, *tables, plans, drawn, arrived, vocab,
        row_step, num_chunks, TURN=TURN, PROGRAMS=triton.next_power_of_2(num_parts), PLAN=PLAN, **sizes,
        launch_pdl=launches_early(logits.device),
    )  # fmt: skip
    _settle[(num_rows, num_parts)](
        logits, temperature, *filters, bounds, plans, ids, num_listed, drawn, arrived, vocab, row_step,
        TURN=TURN, BLOCK=BLOCK, PLAN=PLAN, num_warps=8, maxnreg=80,
        launch_pdl=launches_early(logits.device),
    )  # fmt: skip
    return drawn, bad.view(torch.bool)
