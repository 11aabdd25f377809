"""Acceptance in Triton: `match_drafts` and `accept_drafts` of the reference, from logits, without the host.

Distributions are those of the sampling kernels, in whole units of the largest probability. What filters keep is a
prefix of the order (distance, id), so its last token tells all of it, and `sample` with the random number 1 gives that
token. What is left of the target is counted in units of 2^-60. Sums of whole numbers are exact in any order, and sums
of floats are those of a chunk or of all chunks of a row; so a request has the same result in any batch.

Three launches. `_total` finds the largest logit of every row and adds up rows without filters, chunk by chunk relative
to the peak of each. `_weigh` adds up what filters keep of the others; the last program of a request judges the drafts,
all at once. `_choose` adds up what is left behind the last accepted one; the last program of a request draws from that
in the order of ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.arrival import counters, is_last
from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.sampling.search import UNITS, _distance, _inverse, _part_of, _target, _units
from dsv4_kernels.sampling.triton import CHUNK, PROGRAMS, TURN

LEFT: tl.constexpr = tl.constexpr(1152921504606846976.0)  # 2^60


@triton.jit
def _row(target, proposal, request, place, vocab, K: tl.constexpr):
    """The logits of one of the 2 K + 1 rows of a request: first those of the target, then those of the proposal."""
    if place <= K:
        row = target + (request * (K + 1) + place) * vocab
    else:
        row = proposal + (request * K + place - K - 1) * vocab
    return row


@triton.jit
def _kept(values, token, top, limit, last, temperature, filtered):
    """Units of some tokens of a row, 0 for what the filters cut, which is behind `last` at the distance `limit`."""
    distance = _distance(values, top, temperature)
    keeps = (distance < limit) | ((distance == limit) & (token <= last)) | (filtered == 0)
    return tl.where(keeps, _units(distance), 0)


@triton.jit
def _total(
    target,  # float32 [requests, K + 1, vocab]
    proposal,  # float32 [requests, K, vocab]
    temperatures,
    peaks,  # float32 [requests, 2 K + 1, chunks], as masses
    masses,
    tops,  # float32 [requests, 2 K + 1]
    totals,  # float64 [requests, 2 K + 1], units; of rows with filters not yet
    arrived,
    vocab,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    wait_for_previous()
    at, chunk, num_chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    request = at // (2 * K + 1)
    temperature = tl.load(temperatures + request)
    if temperature != 0:
        inverse = _inverse(temperature)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        logits = _row(target, proposal, request, at % (2 * K + 1), vocab, K)
        values = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
        peak = tl.max(values)
        finite = tl.where(peak == float("-inf"), 0.0, peak)
        tl.store(peaks + at * num_chunks + chunk, peak)
        tl.store(masses + at * num_chunks + chunk, tl.sum(tl.exp((values - finite) * inverse)))
        if is_last(arrived + at, num_chunks):
            lane = tl.arange(0, CHUNKS)
            each = tl.load(peaks + at * num_chunks + lane, mask=lane < num_chunks, other=float("-inf"))
            mass = tl.load(masses + at * num_chunks + lane, mask=lane < num_chunks, other=0.0)
            top = tl.max(each)
            tl.store(tops + at, top)
            tl.store(totals + at, tl.sum(mass.to(tl.float64) * tl.exp((each - top) * inverse).to(tl.float64)) * UNITS)


@triton.jit
def _last(target_lasts, proposal_lasts, request, place, K: tl.constexpr):
    """The last token that filters keep, of one of the 2 K + 1 rows of a request."""
    if place <= K:
        last = tl.load(target_lasts + request * (K + 1) + place)
    else:
        last = tl.load(proposal_lasts + request * K + place - K - 1)
    return last


@triton.jit
def _shares(logits, token, last, there, temperature, filtered, tops, limits, totals, at, vocab):
    """Probabilities of some tokens, each in a row of its own, float64. Stores the distance of the last one kept."""
    top, total = tl.load(tops + at, mask=there, other=0.0), tl.load(totals + at, mask=there, other=1.0)
    values = tl.load(logits + token, mask=there, other=0.0)
    limit = _distance(tl.load(logits + last, mask=there, other=0.0), top, temperature)
    tl.store(limits + at, limit, mask=there)
    return _kept(values, token, top, limit, last, temperature, filtered).to(tl.float64) / total


@triton.jit
def _judge(
    target,
    target_lasts,
    proposal,
    proposal_lasts,
    drafts,
    coins,
    temperature,
    filtered,
    tops,
    limits,
    totals,
    accepted,
    refused,
    tokens,
    request,
    vocab,
    K: tl.constexpr,
    LANES: tl.constexpr,
):
    """Store how many drafts of a request are accepted, whether one was refused behind them, and a greedy token."""
    k = tl.arange(0, LANES)
    mine, other = request * (K + 1) + k, request * K + k
    draft = tl.load(drafts + other, mask=k < K, other=-1)
    best = tl.load(target_lasts + mine, mask=k <= K, other=0)
    fits = best == draft
    if temperature != 0:
        token, at = tl.maximum(draft, 0), request * (2 * K + 1) + k
        p = _shares(
            target + mine * vocab, token, best, k <= K, temperature, filtered, tops, limits, totals, at, vocab
        )  # fmt: skip
        last = tl.load(proposal_lasts + other, mask=k < K, other=0)
        q = _shares(
            proposal + other * vocab, token, last, k < K, temperature, filtered, tops, limits, totals, at + K + 1, vocab
        )  # fmt: skip
        fits = tl.load(coins + other, mask=k < K, other=1.0) * q < p
    num = tl.min(tl.where((draft >= 0) & fits, K, k))
    tl.store(accepted + request, num.to(tl.int64))
    tl.store(refused + request, tl.max(((k == num) & (draft >= 0)).to(tl.int32)))
    tl.store(tokens + request, tl.sum(tl.where(k == num, best, 0)))  # sampled ones are replaced


@triton.jit
def _weigh(
    target,
    target_lasts,
    proposal,
    proposal_lasts,
    drafts,
    coins,
    temperatures,
    filters,
    tops,
    limits,  # float32 [requests, 2 K + 1]: distances of the last tokens that are kept
    sums,  # int64 [requests, 2 K + 1, programs]
    totals,
    accepted,
    refused,
    tokens,
    arrived,
    vocab,
    K: tl.constexpr,
    LANES: tl.constexpr,
    TURN: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    wait_for_previous()
    request, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    temperature, filtered = tl.load(temperatures + request), tl.load(filters + request)
    sums += request * (2 * K + 1) * num_parts
    judges = (tl.program_id(1) == 0) & (part == 0)
    if (temperature != 0) & (filtered != 0):
        place = tl.program_id(1)
        logits = _row(target, proposal, request, place, vocab, K)
        top = tl.load(tops + request * (2 * K + 1) + place)
        last = _last(target_lasts, proposal_lasts, request, place, K)
        limit = _distance(tl.load(logits + last), top, temperature)
        units = request * 0
        for start in range(part * TURN, vocab, num_parts * TURN):
            token = start + tl.arange(0, TURN)
            values = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
            units += tl.sum(_kept(values, token, top, limit, last, temperature, filtered))
        tl.store(sums + place * num_parts + part, units)
        judges = is_last(arrived + request, (2 * K + 1) * num_parts)
        if judges:
            row, parts = tl.arange(0, 2 * LANES), tl.arange(0, PROGRAMS)
            there = (row < 2 * K + 1)[:, None] & (parts < num_parts)[None, :]
            each = tl.load(sums + row[:, None] * num_parts + parts[None, :], mask=there, other=0)
            total = tl.sum(each, axis=1).to(tl.float64)
            tl.store(totals + request * (2 * K + 1) + row, total, mask=row < 2 * K + 1)
            tl.debug_barrier()  # other threads read them
    if judges:
        _judge(
            target, target_lasts, proposal, proposal_lasts, drafts, coins, temperature, filtered, tops, limits, totals,
            accepted, refused, tokens, request, vocab, K, LANES,
        )  # fmt: skip


@triton.jit
def _left(token, mine, other, temperature, filtered, refused, vocab):
    """What is left of the target for some tokens of a request, in units of 2^-60.

    Args: of the row behind the accepted drafts, and of the proposal of a refused one: its start, largest logit,
    distance and id of the last token that is kept, and one over its total.
    """
    logits, top, limit, last, share = mine
    values = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
    rest = _kept(values, token, top, limit, last, temperature, filtered).to(tl.float64) * share
    if refused > 0:
        logits, top, limit, last, share = other
        values = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
        rest = rest - _kept(values, token, top, limit, last, temperature, filtered).to(tl.float64) * share
    return (tl.maximum(rest, 0.0) * LEFT).to(tl.int64)


@triton.jit
def _side(logits, lasts, tops, limits, totals, row, at, vocab):
    """What `_left` wants of a row."""
    share = 1.0 / tl.load(totals + at)
    return logits + row * vocab, tl.load(tops + at), tl.load(limits + at), tl.load(lasts + row), share


@triton.jit
def _choose(
    target,
    target_lasts,
    proposal,
    proposal_lasts,
    draws,
    temperatures,
    filters,
    tops,
    limits,
    totals,
    accepted,
    refused,
    tokens,
    left_sums,  # int64 [requests, chunks]
    arrived,
    vocab,
    num_chunks,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    wait_for_previous()
    request, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, filtered = tl.load(temperatures + request), tl.load(filters + request)
    num, has_refused = tl.load(accepted + request), tl.load(refused + request)
    if temperature != 0:
        row, at = request * (K + 1) + num, request * (2 * K + 1) + num
        mine = _side(target, target_lasts, tops, limits, totals, row, at, vocab)
        behind = tl.minimum(num, K - 1)
        at = request * (2 * K + 1) + K + 1 + behind
        other = _side(proposal, proposal_lasts, tops, limits, totals, request * K + behind, at, vocab)
        for chunk in range(part, num_chunks, num_parts):
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            parts = _left(token, mine, other, temperature, filtered, has_refused, vocab)
            tl.store(left_sums + request * num_chunks + chunk, tl.sum(parts))
        if is_last(arrived + request, num_parts):
            lane = tl.arange(0, CHUNKS)
            sums = tl.load(left_sums + request * num_chunks + lane, mask=lane < num_chunks, other=0)
            total = tl.sum(sums)
            # Only rounding can leave nothing: p and q are then the same, and the last token that is kept, which
            # `_judge` stored, is one of p's.
            if total > 0:
                place, rest = _part_of(sums, _target(tl.load(draws + row), total))
                first = place * CHUNK
                each = _left(first + tl.arange(0, CHUNK), mine, other, temperature, filtered, has_refused, vocab)
                place, rest = _part_of(tl.sum(tl.reshape(each, [CHUNK // 128, 128]), axis=1), rest)
                first += place * 128
                few = _left(first + tl.arange(0, 128), mine, other, temperature, filtered, has_refused, vocab)
                place, _ = _part_of(few, rest)
                tl.store(tokens + request, (first + place).to(tl.int64))


def accept(
    target: Tensor,
    target_lasts: Tensor,
    proposal: Tensor,
    proposal_lasts: Tensor,
    drafts: Tensor,
    *,
    temperature: Tensor,
    is_filtered: Tensor,
    coins: Tensor,
    draws: Tensor,
) -> tuple[Tensor, Tensor]:
    """Judge the drafts of B requests, greedy where the temperature is 0 (Leviathan et al. 2023, see reference.py).

    Args:
        target, proposal: float32 [B, K + 1, V] and [B, K, V], contiguous logits behind 0 to K drafts and of each draft;
            finite maxima.
        target_lasts, proposal_lasts: int64 [B, K + 1] and [B, K], what `sample` draws from these rows with the
            request's settings and the random number 1: the last token that filters keep, of greedy rows the best one.
        drafts: int64 [B, K], K >= 1; -1 = none; the others come first.
        temperature: float32 [B]. is_filtered: uint8 [B], whether top-k, top-p or min-p cut anything.
        coins, draws: float64 [B, K] and [B, K + 1] in [0, 1).

    Returns int64 [B] how many drafts are accepted and int64 [B] the token after them. Raises ValueError for shapes and
    dtypes that do not fit together.
    """
    requests, width, vocab = target.shape
    shapes = [tuple(tensor.shape) for tensor in (target_lasts, proposal, proposal_lasts, drafts, coins, draws)]
    k = width - 1
    expected = [(requests, width), (requests, k, vocab), *[(requests, k)] * 3, (requests, width)]
    dtypes = (target.dtype, proposal.dtype, is_filtered.dtype, coins.dtype, draws.dtype)
    if k < 1 or shapes != expected or dtypes != (*[torch.float32] * 2, torch.uint8, *[torch.float64] * 2):
        raise ValueError(f"accept: shapes {shapes}, dtypes {dtypes}; expected {expected} and K >= 1")
    accepted, tokens = (torch.empty(requests, dtype=torch.int64, device=target.device) for _ in range(2))
    if not requests:
        return accepted, tokens
    num_chunks, num_turns, rows = triton.cdiv(vocab, CHUNK), triton.cdiv(vocab, TURN), 2 * k + 1
    num_parts = min(num_turns, triton.cdiv(PROGRAMS, requests * rows))

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(requests, *shape, dtype=dtype, device=target.device)

    peaks, masses = (empty(rows, num_chunks, dtype=torch.float32) for _ in range(2))
    tops, limits = (empty(rows, dtype=torch.float32) for _ in range(2))
    totals, sums = empty(rows, dtype=torch.float64), empty(rows, num_parts, dtype=torch.int64)
    refused, left_sums = empty(dtype=torch.int32), empty(num_turns, dtype=torch.int64)
    arrived = counters(target.device, requests * rows)
    sides = (target, target_lasts, proposal, proposal_lasts)
    _total[(requests * rows, num_chunks)](
        target, proposal, temperature, peaks, masses, tops, totals, arrived, vocab,
        K=k, CHUNK=CHUNK, CHUNKS=triton.next_power_of_2(num_chunks), num_warps=8,
        launch_pdl=launches_early(target.device),
    )  # fmt: skip
    _weigh[(requests, rows, num_parts)](
        *sides, drafts, coins, temperature, is_filtered, tops, limits, sums, totals, accepted, refused, tokens, arrived,
        vocab, K=k, LANES=triton.next_power_of_2(width), TURN=TURN, PROGRAMS=triton.next_power_of_2(num_parts),
        num_warps=8,
        launch_pdl=launches_early(target.device),
    )  # fmt: skip
    _choose[(requests, min(num_turns, triton.cdiv(PROGRAMS, requests)))](
        *sides, draws, temperature, is_filtered, tops, limits, totals, accepted, refused, tokens, left_sums, arrived,
        vocab, num_turns, K=k, CHUNK=TURN, CHUNKS=triton.next_power_of_2(num_turns), num_warps=8,
        launch_pdl=launches_early(target.device),
    )  # fmt: skip
    return accepted, tokens
