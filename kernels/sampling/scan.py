"""The first launch of the sampler: one pass over the rows, which settles greedy ones.

Of a row without filters it leaves what `_draw_by_id` draws from, of others a bound for what their filters keep.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.arrival import is_last
from dsv4_kernels.dependent import wait_for_previous
from dsv4_kernels.sampling.search import BINS, UNITS, _distance, _inverse, _kth_bound, _part_of, _target


@triton.jit
def _has_k(top_k, vocab):
    return (top_k > 0) & (top_k < vocab)


@triton.jit
def _best(peaks, places, row, num_chunks, vocab, CHUNKS: tl.constexpr):
    """The largest logit of a row, whether the row has NaN or no finite maximum, and the lowest id of the largest."""
    lane = tl.arange(0, CHUNKS)
    peak = tl.load(peaks + row * num_chunks + lane, mask=lane < num_chunks, other=float("-inf"))
    top = tl.max(peak)
    bad = (tl.max((peak != peak).to(tl.int32)) > 0) | (top == float("inf")) | (top == float("-inf"))
    place = tl.load(places + row * num_chunks + lane, mask=lane < num_chunks, other=vocab - 1)
    return top, bad, tl.min(tl.where(peak == top, place, vocab - 1)).to(tl.int64)


@triton.jit
def _chunk_masses(peaks, masses, row, num_chunks, top, inverse, CHUNKS: tl.constexpr):
    """Peaks of the chunks, their masses relative to these, and these relative to the largest logit of the row."""
    lane = tl.arange(0, CHUNKS)
    peak = tl.load(peaks + row * num_chunks + lane, mask=lane < num_chunks, other=float("-inf"))
    mass = tl.load(masses + row * num_chunks + lane, mask=lane < num_chunks, other=0.0)
    return peak, mass, tl.exp((peak - top) * inverse)


@triton.jit
def _draw_by_id(logits, vocab, peak, mass, relative, inverse, share, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The token of a row without filters, whose order is that of ids: its chunk, its 128 tokens, then itself.

    The mass of a chunk counts relative to its own peak, so the target within it has to be scaled.
    """
    lane = tl.arange(0, CHUNKS)
    parts = (mass.to(tl.float64) * relative.to(tl.float64) * UNITS).to(tl.int64)
    chunk, rest = _part_of(parts, _target(share, tl.sum(parts)))
    part = tl.sum(tl.where(lane == chunk, parts, 0))
    own_peak = tl.max(tl.where(lane == chunk, peak, float("-inf")))
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
    units = (tl.exp((value - own_peak) * inverse) * UNITS).to(tl.int64)
    blocks = tl.sum(tl.reshape(units, [CHUNK // 128, 128]), axis=1)
    total = tl.sum(blocks)
    # From the end, so that the last unit of the row is the last of its chunk, whatever the rounding.
    scaled = total - 1 - ((part - 1 - rest).to(tl.float64) * (total.to(tl.float64) / part.to(tl.float64))).to(tl.int64)
    block, rest = _part_of(blocks, tl.where(part == total, rest, tl.maximum(scaled, 0)))
    first = chunk * CHUNK + block * 128
    token = first + tl.arange(0, 128)
    value = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
    place, _ = _part_of((tl.exp((value - own_peak) * inverse) * UNITS).to(tl.int64), rest)
    return (first + place).to(tl.int64)


@triton.jit
def _cut(near, total, top_k, top_p, min_p, vocab):
    """A distance within which lie the k-th token, where top-p crosses, and what min-p keeps; or all of them that can be
    the end of what is kept. Tokens behind 32 have no units.

    Args: the distances of the nearest tokens of every 128, and the row's mass relative to its largest token.
    """
    cut = 32.0
    if _has_k(top_k, vocab):
        cut = _kth_bound(near, top_k).to(tl.float32, bitcast=True)
    elif top_p < 1:
        # All tokens behind it have together less than top-p cuts: they are fewer than vocab. The hundredth is for
        # rounding, which is 1e-5.
        cut = tl.minimum(cut, tl.log(vocab / ((1.0 - top_p) * total)) + 0.01)
    # top-p of what top-k keeps needs all of that.
    if (min_p > 0) & ((_has_k(top_k, vocab) == 0) | (top_p >= 1)):
        cut = tl.minimum(cut, 0.01 - tl.log(min_p))
    return tl.maximum(cut, 1e-6)


@triton.jit
def _scan(
    logits,
    temperatures,
    top_ks,  # int64
    top_ps,
    min_ps,
    peaks,  # [rows, chunks], like places and masses
    places,
    masses,  # float32, relative to the chunk's peak
    near,  # float32 [rows, chunks, 32], largest logits
    units_table,  # int64 [rows, BINS]
    count_table,  # int32 [rows, BINS]
    num_listed,
    bounds,  # float32 [rows, 2]: the largest logit, and the distance that counts: 0 = no filter, -1 = done
    drawn,  # int64
    bad_rows,  # uint8
    arrived,
    vocab,
    row_step,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BINS_EACH: tl.constexpr,
):
    wait_for_previous()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_chunks = tl.num_programs(1)
    temperature = tl.load(temperatures + row)
    top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
    has_k = _has_k(top_k, vocab)
    is_filtered = (temperature != 0) & (has_k | (top_p < 1) | (min_p > 0))
    inverse = _inverse(temperature)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * row_step + token, mask=token < vocab, other=float("-inf"))
    peak = tl.max(values)
    at = row * num_chunks + chunk
    tl.store(places + at, tl.min(tl.where(values == peak, token, vocab - 1)))
    tl.store(peaks + at, tl.where(tl.max((values != values).to(tl.int32)) > 0, float("nan"), peak))
    if temperature != 0:
        finite = tl.where(peak == float("-inf"), 0.0, peak)
        tl.store(masses + at, tl.sum(tl.exp((values - finite) * inverse)))
    if is_filtered:
        bin_ = chunk * BINS_EACH + tl.arange(0, BINS_EACH)
        tl.store(units_table + row * BINS + bin_, tl.zeros([BINS_EACH], tl.int64), mask=bin_ < BINS)
        tl.store(count_table + row * BINS + bin_, tl.zeros([BINS_EACH], tl.int32), mask=bin_ < BINS)
        if has_k:
            nearest = tl.max(tl.reshape(values, [CHUNK // 128, 128]), axis=1)
            tl.store(near + at * (CHUNK // 128) + tl.arange(0, CHUNK // 128), nearest)
    if is_last(arrived + row, num_chunks):
        top, bad, best = _best(peaks, places, row, num_chunks, vocab, CHUNKS)
        cut = -1.0
        if (temperature != 0) & (bad == 0):
            cut = 0.0
            if is_filtered:
                _, mass, relative = _chunk_masses(peaks, masses, row, num_chunks, top, inverse, CHUNKS)
                block = tl.arange(0, CHUNKS * (CHUNK // 128))
                known = has_k & (block < num_chunks * (CHUNK // 128))
                nearest = tl.load(near + row * num_chunks * (CHUNK // 128) + block, mask=known, other=float("-inf"))
                distance = _distance(nearest, top, temperature)
                cut = _cut(distance, tl.sum(mass * relative), top_k, top_p, min_p, vocab)
        tl.store(num_listed + row, 0)
        tl.store(bounds + row * 2, top)
        tl.store(bounds + row * 2 + 1, cut)
        tl.store(drawn + row, tl.minimum(best, vocab - 1))
        tl.store(bad_rows + row, bad.to(tl.uint8))
