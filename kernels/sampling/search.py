"""Device functions of the sampler: units, bins of distances, and exact searches in a list of tokens.

A list holds ids of one row in any order; its tokens are read from the logits through it. Sums are whole numbers of
units, so no result depends on the order of a list.
"""

from __future__ import annotations

import triton
import triton.language as tl

BINS: tl.constexpr = tl.constexpr(1024)  # of a row's distances, of equal width
UNITS: tl.constexpr = tl.constexpr(35184372088832.0)  # 2^45; the units of 2^17 tokens fit in int64


@triton.jit
def _distance(values, top, temperature):
    """The reference's `scaled`, negated, so that its bits are in order."""
    return tl.abs(tl.div_rn(values - top, temperature))


@triton.jit
def _inverse(temperature):
    """One over the temperature, finite."""
    return 1.0 / tl.maximum(temperature, 1.2e-38)


@triton.jit
def _units(distance):
    """Probability relative to the largest, in units."""
    return (tl.where(distance < 40.0, tl.exp(-distance), 0.0) * UNITS).to(tl.int64)


@triton.jit
def _bins(distance, scale):
    """Bin of the histogram; bins are in the order of distances, because a product rounds in order."""
    return tl.minimum(distance * scale, BINS - 1.0).to(tl.int32)


@triton.jit
def _target(share, units):
    """The unit that a random number in [0, 1] meets, int64."""
    return tl.minimum((share * units.to(tl.float64)).to(tl.int64), units - 1)


@triton.jit
def _part_of(sums, target):
    """In which of some parts the target lies, and how far."""
    lane = tl.arange(0, sums.shape[0])
    part = tl.sum((tl.cumsum(sums, axis=0) <= target).to(tl.int32))
    return part, target - tl.sum(tl.where(lane < part, sums, 0))


@triton.jit
def _crossing(top_p, units):
    """The last unit that top-p keeps: tokens are kept while less than top_p of the units lies before them."""
    return tl.maximum(tl.ceil(top_p.to(tl.float64) * units.to(tl.float64)).to(tl.int64) - 1, 0)


@triton.jit
def _quotient(units, one):
    """units // one of int64, at most 2^17 (so float32 is right to one): an integer division would be a call."""
    guess = (units.to(tl.float32) / one.to(tl.float32)).to(tl.int64)
    guess -= (guess * one > units).to(tl.int64)
    return guess + ((guess + 1) * one <= units).to(tl.int64)


@triton.jit
def _kth_bound(distance, k):
    """A distance above that of the k nearest of some, int32 bits, at most 2^-7 of it too far; 32 for fewer than k."""
    order, quarter = distance.to(tl.int32, bitcast=True), tl.arange(0, 4)
    found = tl.zeros([1], tl.int32)
    for step in tl.static_range(8):
        threshold = found + (quarter << (29 - 2 * step))
        counts = tl.sum((order[:, None] < threshold[None, :]).to(tl.int32), axis=0)
        found += (tl.sum((counts < k).to(tl.int32)) - 1) << (29 - 2 * step)
    return tl.minimum(tl.max(found), 0x41FF8000) + 0x8000


@triton.jit
def _listed(logits, ids, num, top, temperature, scale, first, last, start, BLOCK: tl.constexpr):
    """Ids and distances of BLOCK tokens of a list, and which of them are there and in the bins `first` to `last`."""
    at = start + tl.arange(0, BLOCK)
    id_ = tl.load(ids + at, mask=at < num, other=0)
    distance = _distance(tl.load(logits + id_, mask=at < num, other=float("-inf")), top, temperature)
    bin_ = _bins(distance, scale)
    return id_, distance, (at < num) & (bin_ >= first) & (bin_ <= last)


@triton.jit
def _find(logits, ids, num, top, temperature, scale, first, last, target, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Bits of the distance at which the count (or the units) of what is nearer passes `target`, two bits a pass.

    Only tokens of the bins `first` to `last` count.
    """
    low, high = tl.full([BLOCK], 0x7FFFFFFF, tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, num, BLOCK):
        _, distance, counts = _listed(logits, ids, num, top, temperature, scale, first, last, start, BLOCK)
        order = distance.to(tl.int32, bitcast=True)
        low, high = tl.minimum(low, tl.where(counts, order, 0x7FFFFFFF)), tl.maximum(high, tl.where(counts, order, 0))
    found = tl.min(low).to(tl.int64)
    span = tl.maximum(tl.max(high) - found, 0)  # bits above its highest are known
    skipped = tl.sum(((span >> (30 - 2 * tl.arange(0, 16))) == 0).to(tl.int32))
    quarter = tl.arange(0, 4).to(tl.int64)
    for step in range(skipped, 16):
        shift = 30 - 2 * step
        threshold = tl.minimum(found + (quarter << shift), 0x7FFFFFFF).to(tl.int32)
        sums = tl.zeros([BLOCK, 4], tl.int64)
        for start in range(0, num, BLOCK):
            _, distance, counts = _listed(logits, ids, num, top, temperature, scale, first, last, start, BLOCK)
            weights = counts.to(tl.int64) if BY_COUNT else tl.where(counts, _units(distance), 0)
            nearer = distance.to(tl.int32, bitcast=True)[:, None] < threshold[None, :]
            sums += tl.where(nearer, weights[:, None], 0)
        found += (tl.sum((tl.sum(sums, axis=0) <= target).to(tl.int64)) - 1) << shift
    return found.to(tl.int32)


@triton.jit
def _nearer(logits, ids, num, top, temperature, scale, first, last, bits, BLOCK: tl.constexpr):
    """Count and units of what is nearer than the distance with these bits, units of one at it, how many are at it and
    the largest of their ids; of tokens in the bins `first` to `last`."""
    count, units, one = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    equal, largest = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, num, BLOCK):
        id_, distance, counts = _listed(logits, ids, num, top, temperature, scale, first, last, start, BLOCK)
        weights, order = _units(distance), distance.to(tl.int32, bitcast=True)
        nearer, at = counts & (order < bits), counts & (order == bits)
        count += nearer.to(tl.int64)
        units += tl.where(nearer, weights, 0)
        one = tl.maximum(one, tl.where(at, weights, 0))
        equal += at.to(tl.int32)
        largest = tl.maximum(largest, tl.where(at, id_, 0))
    return tl.sum(count), tl.sum(units), tl.max(one), tl.sum(equal), tl.max(largest)


@triton.jit
def _likely(logits, ids, num, top, temperature, scale, first, min_p, BLOCK: tl.constexpr):
    """Units of what has at least `min_p` as probability relative to the largest, from the bin `first` on."""
    units = tl.zeros([BLOCK], tl.int64)
    for start in range(0, num, BLOCK):
        _, distance, counts = _listed(logits, ids, num, top, temperature, scale, first, BINS, start, BLOCK)
        units += tl.where(counts & (tl.exp(-distance) >= min_p), _units(distance), 0)
    return tl.sum(units)


@triton.jit
def _nth(logits, ids, num, top, temperature, scale, bits, rank, BLOCK: tl.constexpr):
    """The id with `rank` lower ones at the distance with these bits, two bits of it a pass: ties go by id."""
    found, quarter = rank.to(tl.int32) * 0, tl.arange(0, 4)
    for step in range(9):
        shift = 16 - 2 * step
        threshold = found + (quarter << shift)
        counts = tl.zeros([BLOCK, 4], tl.int32)
        for start in range(0, num, BLOCK):
            id_, distance, there = _listed(logits, ids, num, top, temperature, scale, 0, BINS, start, BLOCK)
            equal = there & (distance.to(tl.int32, bitcast=True) == bits)
            counts += (equal[:, None] & (id_[:, None] < threshold[None, :])).to(tl.int32)
        found += (tl.sum((tl.sum(counts, axis=0) <= rank).to(tl.int32)) - 1) << shift
    return found
