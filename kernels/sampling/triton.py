"""Sampling in Triton: `sample` of the reference without a sort and without the host, four launches for any settings.

Probabilities relative to the largest are whole numbers of units, 2^45 of them for the largest: sums of units are exact
in any order, so a row has the same draw in any batch, and no mass is lost between two passes.

`_scan` finds the largest logit of every chunk of a row; `_weigh` the distances to it, the units of every chunk and a
histogram of the distances in steps of half a nat; `_collect` packs the nearest tokens, as many as fit, in the order of
ids; `_draw` draws. What filters keep is a prefix of the order (distance, id), and its end, like the token that the
random number meets, is where a count or a sum of units passes a target. `_find` looks for that distance bit by bit,
over the packed tokens if the answer is certainly among them and over the whole row if not: exact either way, slow only
for flat rows that keep more than CAPACITY tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # tokens of one program
CAPACITY = 1024  # packed tokens of a row
BINS = 64  # of the histogram; the last holds all that is 31.5 nats away or more, and is never packed
UNITS: tl.constexpr = tl.constexpr(35184372088832.0)  # 2^45; the units of 2^17 tokens fit in int64


@triton.jit
def _units(distance):
    """Probability relative to the largest, in units."""
    return (tl.where(distance < 40.0, tl.exp(-distance), 0.0) * UNITS).to(tl.int64)


@triton.jit
def _bins(distance):
    """Bin of the histogram."""
    return tl.where(distance < 31.5, (distance * 2.0).to(tl.int32), 63)


@triton.jit
def _top(peaks, row, num_chunks, CHUNKS: tl.constexpr):
    """The largest logit of a row, and whether the row has NaN, or no finite maximum."""
    chunk = tl.arange(0, CHUNKS)
    peak = tl.load(peaks + row * num_chunks + chunk, mask=chunk < num_chunks, other=float("-inf"))
    top = tl.max(peak)
    bad = (tl.max((peak != peak).to(tl.int32)) > 0) | (top == float("inf")) | (top == float("-inf"))
    return top, bad


@triton.jit
def _scan(logits, peaks, places, vocab, row_step, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * row_step + token, mask=token < vocab, other=float("-inf"))
    peak = tl.max(values)
    at = row * tl.num_programs(1) + chunk
    tl.store(places + at, tl.min(tl.where(values == peak, token, vocab - 1)))
    tl.store(peaks + at, tl.where(tl.max((values != values).to(tl.int32)) > 0, float("nan"), peak))


@triton.jit
def _weigh(
    logits,
    temperatures,
    peaks,
    distances,  # float32 [rows, vocab]: the reference's `scaled`, negated, so that its bits are in order
    masses,
    counts,
    vocab,
    row_step,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_chunks = tl.num_programs(1)
    temperature = tl.load(temperatures + row)
    if temperature != 0:
        top, _ = _top(peaks, row, num_chunks, CHUNKS)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        values = tl.load(logits + row * row_step + token, mask=token < vocab, other=float("-inf"))
        distance = tl.abs(tl.div_rn(values - top, temperature))
        tl.store(distances + row * vocab + token, distance, mask=token < vocab)
        at = row * num_chunks + chunk
        tl.store(masses + at, tl.sum(_units(distance)))
        tl.store(counts + at * 64 + tl.arange(0, 64), tl.histogram(_bins(distance), 64))


@triton.jit
def _collect(
    temperatures,
    distances,
    counts,
    packed,  # float32 [rows, CAPACITY], distances
    packed_ids,
    num_packed,
    num_bins,
    vocab,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_chunks = tl.num_programs(1)
    if tl.load(temperatures + row) != 0:
        part, bin_ = tl.arange(0, CHUNKS), tl.arange(0, 64)
        table = tl.load(
            counts + (row * num_chunks + part)[:, None] * 64 + bin_[None, :],
            mask=(part < num_chunks)[:, None],
            other=0,
        )
        totals = tl.sum(table, axis=0)
        last = tl.sum(((tl.cumsum(totals, axis=0) <= CAPACITY) & (bin_ < 63)).to(tl.int32))
        packs = bin_ < last
        first = tl.sum(tl.sum(tl.where((part < chunk)[:, None] & packs[None, :], table, 0), axis=1))
        if chunk == 0:
            tl.store(num_packed + row, tl.sum(tl.where(packs, totals, 0)))
            tl.store(num_bins + row, last)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        distance = tl.load(distances + row * vocab + token, mask=token < vocab, other=float("inf"))
        chosen = _bins(distance) < last
        rank = first + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        chosen = chosen & (rank < CAPACITY)
        tl.store(packed + row * CAPACITY + rank, distance, mask=chosen)
        tl.store(packed_ids + row * CAPACITY + rank, token, mask=chosen)


@triton.jit
def _find(distances, num, target, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Bits of the distance at which the count (or the units) of what is nearer passes `target`, two bits a pass."""
    quarter = tl.arange(0, 4).to(tl.int64)
    found = target * 0
    for step in range(16):
        shift = 30 - 2 * step
        threshold = tl.minimum(found + (quarter << shift), 0x7FFFFFFF).to(tl.int32)
        sums = tl.zeros([4], tl.int64)
        for start in range(0, num, BLOCK):
            at = start + tl.arange(0, BLOCK)
            distance = tl.load(distances + at, mask=at < num, other=float("inf"))
            weights = (at < num).to(tl.int64) if BY_COUNT else _units(distance)
            nearer = distance.to(tl.int32, bitcast=True)[:, None] < threshold[None, :]
            sums += tl.sum(tl.where(nearer, weights[:, None], 0), axis=0)
        found += (tl.sum((sums <= target).to(tl.int64)) - 1) << shift
    return found.to(tl.int32)


@triton.jit
def _nearer(distances, num, bits, BLOCK: tl.constexpr):
    """Count and units of what is nearer than the distance with these bits, and the units of one at it."""
    count, units, one = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for start in range(0, num, BLOCK):
        at = start + tl.arange(0, BLOCK)
        distance = tl.load(distances + at, mask=at < num, other=float("inf"))
        weights, order = _units(distance), distance.to(tl.int32, bitcast=True)
        count += (order < bits).to(tl.int64)
        units += tl.where(order < bits, weights, 0)
        one = tl.maximum(one, tl.where(order == bits, weights, 0))
    return tl.sum(count), tl.sum(units), tl.max(one)


@triton.jit
def _likely(distances, num, min_p, BLOCK: tl.constexpr):
    """Units of what has at least `min_p` as probability relative to the largest."""
    units = tl.zeros([BLOCK], tl.int64)
    for start in range(0, num, BLOCK):
        at = start + tl.arange(0, BLOCK)
        distance = tl.load(distances + at, mask=at < num, other=float("inf"))
        units += tl.where(tl.exp(-distance) >= min_p, _units(distance), 0)
    return tl.sum(units)


@triton.jit
def _nth(distances, num, bits, rank, BLOCK: tl.constexpr):
    """Place of the one with `rank` others before it that are as far: ties go by id."""
    place, seen = rank * 0, rank * 0
    for start in range(0, num, BLOCK):
        at = start + tl.arange(0, BLOCK)
        distance = tl.load(distances + at, mask=at < num, other=float("inf"))
        equal = ((distance.to(tl.int32, bitcast=True) == bits) & (at < num)).to(tl.int64)
        hit = (equal > 0) & (seen + tl.cumsum(equal, axis=0) - 1 == rank)
        place += tl.sum(tl.where(hit, at, 0).to(tl.int64))
        seen += tl.sum(equal)
    return place


@triton.jit
def _target(share, units):
    """The unit that a random number in [0, 1) meets, int64."""
    return tl.minimum((share * units.to(tl.float64)).to(tl.int64), units - 1)


@triton.jit
def _quotient(units, one):
    """units // one of int64, at most 2^17 (so float32 is right to one): an integer division would be a call."""
    guess = (units.to(tl.float32) / one.to(tl.float32)).to(tl.int64)
    guess -= (guess * one > units).to(tl.int64)
    return guess + ((guess + 1) * one <= units).to(tl.int64)


@triton.jit
def _crossing(top_p, units):
    """The last unit that top-p keeps: tokens are kept while less than top_p of the units lies before them."""
    return tl.maximum(tl.ceil(top_p.to(tl.float64) * units.to(tl.float64)).to(tl.int64) - 1, 0)


@triton.jit
def _draw_by_id(distances, vocab, mass, total, share, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The token of a row without filters, whose order is that of ids; `mass` are the units of its chunks."""
    target = _target(share, total)
    chunk = tl.sum((tl.cumsum(mass, axis=0) <= target).to(tl.int32))
    before = tl.sum(tl.where(tl.arange(0, CHUNKS) < chunk, mass, 0))
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    distance = tl.load(distances + token, mask=token < vocab, other=float("inf"))
    sums = before + tl.cumsum(_units(distance), axis=0)
    return chunk * CHUNK + tl.sum((sums <= target).to(tl.int64))


@triton.jit
def _draw(
    temperatures,
    top_ks,  # int64
    top_ps,
    min_ps,
    uniforms,  # float64
    peaks,
    places,
    distances,
    masses,
    packed,
    packed_ids,
    num_packed,
    num_bins,
    drawn,  # int64
    bad_rows,  # uint8
    vocab,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    top, bad = _top(peaks, row, num_chunks, CHUNKS)
    chunk = tl.arange(0, CHUNKS)
    at = row * num_chunks + chunk
    peak = tl.load(peaks + at, mask=chunk < num_chunks, other=float("nan"))
    place = tl.load(places + at, mask=chunk < num_chunks, other=0)
    token = tl.min(tl.where(peak == top, place, vocab - 1)).to(tl.int64)
    if (temperature != 0) & (bad == 0):
        top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
        share = tl.load(uniforms + row)
        mass = tl.load(masses + at, mask=chunk < num_chunks, other=0)
        total = tl.sum(mass)
        has_k = (top_k > 0) & (top_k < vocab)
        if has_k | (top_p < 1) | (min_p > 0):
            listed, num = packed + row * CAPACITY, tl.load(num_packed + row)
            _, packed_units, _ = _nearer(listed, num, 0x7FFFFFFF, CAPACITY)
            all_likely = tl.exp(tl.load(num_bins + row) * -0.5) < min_p
            settled = (top_p < 1) & (_crossing(top_p, total) < packed_units) | all_likely
            settled = (has_k & (top_k <= num)) | ((has_k == 0) & settled)
            if settled == 0:
                listed, num = distances + row * vocab, vocab
            limit = total
            if has_k:
                bits = _find(listed, num, top_k - 1, True, CAPACITY)
                count, units, one = _nearer(listed, num, bits, CAPACITY)
                limit = units + (top_k - count) * one
            kept = limit
            if min_p > 0:
                kept = tl.minimum(kept, _likely(listed, num, min_p, CAPACITY))
            crossing = _crossing(top_p, limit)
            if (top_p < 1) & ((settled == 0) | (crossing < packed_units)):
                bits = _find(listed, num, crossing, False, CAPACITY)
                _, units, one = _nearer(listed, num, bits, CAPACITY)
                kept = tl.minimum(kept, units + (_quotient(crossing - units, one) + 1) * one)
            target = _target(share, tl.maximum(kept, 35184372088832))
            bits = _find(listed, num, target, False, CAPACITY)
            _, units, one = _nearer(listed, num, bits, CAPACITY)
            token = _nth(listed, num, bits, _quotient(target - units, one), CAPACITY)
            if settled:
                token = tl.load(packed_ids + row * CAPACITY + token).to(tl.int64)
        else:
            token = _draw_by_id(distances + row * vocab, vocab, mass, total, share, CHUNK, CHUNKS)
    tl.store(drawn + row, tl.minimum(token, vocab - 1))
    tl.store(bad_rows + row, bad.to(tl.uint8))


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
        return torch.empty(*shape, device=logits.device, dtype=dtype)

    drawn, bad = empty(num_rows, dtype=torch.int64), empty(num_rows, dtype=torch.uint8)
    if not num_rows:
        return drawn, bad.view(torch.bool)
    num_chunks = triton.cdiv(vocab, CHUNK)
    peaks, places = empty(num_rows, num_chunks, dtype=torch.float32), empty(num_rows, num_chunks, dtype=torch.int32)
    masses, counts = (
        empty(num_rows, num_chunks, dtype=torch.int64),
        empty(num_rows, num_chunks, BINS, dtype=torch.int32),
    )
    distances = empty(num_rows, vocab, dtype=torch.float32)
    packed, packed_ids = (empty(num_rows, CAPACITY, dtype=dtype) for dtype in (torch.float32, torch.int32))
    num_packed, num_bins = (empty(num_rows, dtype=torch.int32) for _ in range(2))
    grid, row = (num_rows, num_chunks), logits.stride(0)
    sizes = {"CHUNK": CHUNK, "CHUNKS": triton.next_power_of_2(num_chunks), "num_warps": 8}
    _scan[grid](logits, peaks, places, vocab, row, CHUNK=CHUNK, num_warps=8)
    _weigh[grid](logits, temperature, peaks, distances, masses, counts, vocab, row, **sizes)
    _collect[grid](
        temperature, distances, counts, packed, packed_ids, num_packed, num_bins, vocab, CAPACITY=CAPACITY, **sizes
    )
    _draw[(num_rows,)](
        temperature, top_k, top_p, min_p, uniform, peaks, places, distances, masses, packed, packed_ids, num_packed,
        num_bins, drawn, bad, vocab, num_chunks, CAPACITY=CAPACITY, **sizes,
    )  # fmt: skip
    return drawn, bad.view(torch.bool)
