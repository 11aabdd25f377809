"""`uniform` of reference.py on a GPU: random numbers by request and output, without the host."""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.sampling import reference

GOLDEN = tl.constexpr(reference.GOLDEN)
(FIRST_BITS, FIRST_FACTOR), (SECOND_BITS, SECOND_FACTOR) = (
    (tl.constexpr(bits), tl.constexpr(factor)) for bits, factor in reference.MIXERS
)


@triton.jit
def _mix(value):
    value = (value ^ (value >> FIRST_BITS)) * tl.full([], FIRST_FACTOR, tl.uint64)
    value = (value ^ (value >> SECOND_BITS)) * tl.full([], SECOND_FACTOR, tl.uint64)
    return value ^ (value >> 31)


@triton.jit
def stream_of(seed, STREAM: tl.constexpr):
    """Where the numbers of a request begin: uint64; `seed` int64."""
    start = _mix(seed.to(tl.uint64, bitcast=True))
    if STREAM != 0:
        start = _mix(start ^ STREAM)
    return start


@triton.jit
def number(start, index):
    """float64 in [0, 1), the number of output `index` int64 in a stream."""
    value = _mix(start + (index + 1).to(tl.uint64) * tl.full([], GOLDEN, tl.uint64))
    return (value >> 11).to(tl.float64) * 1.1102230246251565e-16
