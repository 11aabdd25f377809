"""Rotary embedding in registers: the device functions that the Triton kernels of all operations share.

Equal to `apply_rope` of the reference (docs/model.md section 4): interleaved pairs, float32 inside.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_pairs(values):
    """Vectors [n, d] or one [d] to their even and their odd elements."""
    if len(values.shape) == 1:
        pairs = tl.reshape(values, (values.shape[0] // 2, 2))
    else:
        pairs = tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2))
    return tl.split(pairs)


@triton.jit
def interleave(even, odd):
    """Inverse of `split_pairs`."""
    if len(even.shape) == 1:
        values = tl.reshape(tl.join(even, odd), (even.shape[0] * 2,))
    else:
        values = tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1] * 2))
    return values


@triton.jit
def rotate_pairs(even, odd, rotations, keep, half, HALF_ROPE: tl.constexpr, INVERSE: tl.constexpr = False):
    """Pair i of `half` is turned where i >= half - HALF_ROPE, backwards with INVERSE; float32 in and out.

    `rotations`: pointers to the cosine of each vector's pair 0 of the table (f32, cosine | sine), broadcast against the
    pairs in the last dim; `keep` masks vectors.
    """
    pair = tl.arange(0, even.shape[-1])
    turned = (pair >= half - HALF_ROPE) & (pair < half)
    at = rotations + 2 * (pair - (half - HALF_ROPE))
    cosine = tl.load(at, mask=keep & turned, other=1.0)
    sine = tl.load(at + 1, mask=keep & turned, other=0.0)
    if INVERSE:
        sine = -sine
    return even * cosine - odd * sine, even * sine + odd * cosine


@triton.jit
def rotate(values, rotations, ROPE: tl.constexpr, INVERSE: tl.constexpr = False):
    """bf16 vectors [n, d] of one row of the step, rounded once; the last ROPE dims are turned by the row's angles."""
    even, odd = split_pairs(values.to(tl.float32))
    even, odd = rotate_pairs(even, odd, rotations, True, even.shape[-1], ROPE // 2, INVERSE)
    return interleave(even, odd).to(tl.bfloat16)
