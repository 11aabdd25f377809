"""Acceptance in Triton: `match_drafts` and `accept_drafts` of the reference, from logits, without the host.

Distributions are those of the sampling kernels, in whole units of the largest probability. What filters keep is a
prefix of the order (distance, id), so its last token tells all of it, and `sample` with the random number 1 gives that
token. Sums of units are exact in any order; what is left of the target is counted in units of 2^-60. So a request has
the same result in any batch.

Three launches: `_weigh` adds up the units of every chunk, `_leave` judges the drafts (each program again) and adds up
what is left behind the last accepted one, `_choose` draws from that in the order of ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.sampling.search import _target, _units
from dsv4_kernels.sampling.triton import CHUNK

LEFT: tl.constexpr = tl.constexpr(1152921504606846976.0)  # 2^60


@triton.jit
def _kept(logits, tops, lasts, temperature, filtered, row, token, vocab):
    """Units of some tokens of a row, 0 for what the filters cut."""
    top, last = tl.load(tops + row), tl.load(lasts + row)
    values = tl.load(logits + row * vocab + token, mask=token < vocab, other=float("-inf"))
    distance = tl.abs(tl.div_rn(values - top, temperature))
    limit = tl.abs(tl.div_rn(tl.load(logits + row * vocab + last) - top, temperature))
    keeps = (distance < limit) | ((distance == limit) & (token <= last)) | (filtered == 0)
    return tl.where(keeps & (token < vocab), _units(distance), 0)


@triton.jit
def _weigh(logits, tops, lasts, temperatures, filters, sums, vocab, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, filtered = tl.load(temperatures + row // WIDTH), tl.load(filters + row // WIDTH)
    if temperature != 0:
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        units = _kept(logits, tops, lasts, temperature, filtered, row, token, vocab)
        tl.store(sums + row * tl.num_programs(1) + chunk, tl.sum(units))


@triton.jit
def _total(sums, row, num_chunks, CHUNKS: tl.constexpr):
    chunk = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(sums + row * num_chunks + chunk, mask=chunk < num_chunks, other=0)).to(tl.float64)


@triton.jit
def _leave(
    target,  # f32 [requests, K + 1, vocab]
    target_tops,
    target_lasts,
    target_sums,
    proposal,  # f32 [requests, K, vocab]
    proposal_tops,
    proposal_lasts,
    proposal_sums,
    drafts,
    coins,
    temperatures,
    filters,
    accepted,  # int64 [requests]
    left,  # int64 [requests, vocab]
    left_sums,
    vocab,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    request, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_chunks = tl.num_programs(1)
    temperature, filtered = tl.load(temperatures + request), tl.load(filters + request)
    num, open_, refused = request * 0, request * 0 + 1, request * 0
    for k in range(K):
        draft = tl.load(drafts + request * K + k)
        row, other = request * (K + 1) + k, request * K + k
        token = tl.maximum(draft, 0)
        if temperature != 0:
            wanted = _kept(target, target_tops, target_lasts, temperature, filtered, row, token, vocab)
            offered = _kept(proposal, proposal_tops, proposal_lasts, temperature, filtered, other, token, vocab)
            p = wanted.to(tl.float64) / _total(target_sums, row, num_chunks, CHUNKS)
            q = offered.to(tl.float64) / _total(proposal_sums, other, num_chunks, CHUNKS)
            fits = (tl.load(coins + other) * q < p).to(tl.int64)
        else:
            fits = (tl.load(target_lasts + row) == draft).to(tl.int64)
        is_draft = (draft >= 0).to(tl.int64)
        refused += open_ * is_draft * (1 - fits)
        open_ *= is_draft * fits
        num += open_
    if chunk == 0:
        tl.store(accepted + request, num)
    if temperature != 0:
        row, other = request * (K + 1) + num, request * K + tl.minimum(num, K - 1)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        units = _kept(target, target_tops, target_lasts, temperature, filtered, row, token, vocab)
        rest = units.to(tl.float64) / _total(target_sums, row, num_chunks, CHUNKS)
        if refused > 0:
            units = _kept(proposal, proposal_tops, proposal_lasts, temperature, filtered, other, token, vocab)
            rest = rest - units.to(tl.float64) / _total(proposal_sums, other, num_chunks, CHUNKS)
        parts = (tl.maximum(rest, 0.0) * LEFT).to(tl.int64)
        tl.store(left + request * vocab + token, parts, mask=token < vocab)
        tl.store(left_sums + request * num_chunks + chunk, tl.sum(parts))


@triton.jit
def _choose(
    target_lasts,
    left,
    left_sums,
    draws,
    accepted,
    temperatures,
    tokens,
    vocab,
    num_chunks,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    at = request * (K + 1) + tl.load(accepted + request)
    token = tl.load(target_lasts + at)
    if tl.load(temperatures + request) != 0:
        chunk = tl.arange(0, CHUNKS)
        sums = tl.load(left_sums + request * num_chunks + chunk, mask=chunk < num_chunks, other=0)
        total = tl.sum(sums)
        # Only rounding can leave nothing: p and q are then the same, and the last token that is kept is one of p's.
        if total > 0:
            goal = _target(tl.load(draws + at), total)
            first = tl.sum((tl.cumsum(sums, axis=0) <= goal).to(tl.int32))
            before = tl.sum(tl.where(chunk < first, sums, 0))
            id_ = first * CHUNK + tl.arange(0, CHUNK)
            parts = tl.load(left + request * vocab + id_, mask=id_ < vocab, other=0)
            token = (first * CHUNK + tl.sum((before + tl.cumsum(parts, axis=0) <= goal).to(tl.int32))).to(tl.int64)
    tl.store(tokens + request, token)


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
    num_chunks = triton.cdiv(vocab, CHUNK)

    def sums(*shape: int) -> Tensor:
        return torch.empty(*shape, num_chunks, dtype=torch.int64, device=target.device)

    left = torch.empty(requests, vocab, dtype=torch.int64, device=target.device)
    sides = []
    for logits, lasts in ((target, target_lasts), (proposal, proposal_lasts)):
        side = (logits, logits.amax(-1), lasts, sums(requests, logits.shape[1]))
        grid = (requests * logits.shape[1], num_chunks)
        _weigh[grid](
            *side[:3], temperature, is_filtered, side[3], vocab, WIDTH=logits.shape[1], CHUNK=CHUNK, num_warps=8
        )
        sides += side
    left_sums = sums(requests)
    sizes = {"K": k, "CHUNK": CHUNK, "CHUNKS": triton.next_power_of_2(num_chunks), "num_warps": 8}
    _leave[(requests, num_chunks)](
        *sides, drafts, coins, temperature, is_filtered, accepted, left, left_sums, vocab, **sizes
    )
    _choose[(requests,)](
        target_lasts, left, left_sums, draws, accepted, temperature, tokens, vocab, num_chunks, **sizes
    )
    return accepted, tokens
