"""Steps on vectors in registers that the Triton kernels of compressor and indexer share.

A vector is held as its even and its odd elements, as RoPE pairs and FP4 bytes want it. Formulas and rounding points are
those of `dsv4_kernels.rope`, `quant` and `kv_store` (docs/model.md sections 4, 6 and 9).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_pairs(even, odd, rotations, keep, half, HALF_ROPE: tl.constexpr):
    """RoPE: pair i of `half` is rotated where i >= half - HALF_ROPE; float32 in and out.

    `rotations`: pointers to the cosine of each vector's pair 0 of the table (f32, cosine | sine), broadcast against the
    pairs in the last dim; `keep` masks vectors.
    """
    pair = tl.arange(0, even.shape[-1])
    turned = (pair >= half - HALF_ROPE) & (pair < half)
    at = rotations + 2 * (pair - (half - HALF_ROPE))
    cosine = tl.load(at, mask=keep & turned, other=1.0)
    sine = tl.load(at + 1, mask=keep & turned, other=0.0)
    return even * cosine - odd * sine, even * sine + odd * cosine


@triton.jit
def interleave(even, odd, SHAPE: tl.constexpr):
    """Even and odd elements back in one vector of `SHAPE`."""
    return tl.reshape(tl.join(even, odd), SHAPE)


@triton.jit
def hadamard(x, DIM: tl.constexpr):
    """Walsh-Hadamard transform of bfloat16 vectors [n >= 16, DIM], Sylvester order, times DIM^-0.5, in bfloat16.

    The matrix is made from its definition: the sign is the parity of row & column, read from a table of 16 nibbles.
    """
    both = tl.arange(0, DIM)[:, None] & tl.arange(0, DIM)[None, :]
    parity = (0x6996 >> ((both ^ (both >> 4)) & 15)) & 1
    signs = (1 - 2 * parity).to(tl.bfloat16)
    return (tl.dot(x, signs) * (1.0 / (DIM**0.5))).to(tl.bfloat16)


@triton.jit
def scale_byte(amax, FLOOR: tl.constexpr, LARGEST: tl.constexpr):
    """E8M0 byte of the smallest power of two that brings amax (raised to FLOOR) to at most LARGEST."""
    bits = (tl.maximum(amax, FLOOR) * (1.0 / LARGEST)).to(tl.int32, bitcast=True)
    return (bits + 0x7FFFFF) >> 23


@triton.jit
def power(byte):
    """float32 2^(byte - 127) of E8M0 bytes 1 .. 254."""
    return (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def fp4_code(x):
    """E2M1 codes int32 of scaled float32 values: nearest, ties to the even code, at most 6."""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def fp4_value(code):
    """float32 values of E2M1 codes int32 (the low four bits)."""
    # Exponent and mantissa at the bottom of a float32's exponent field are the value times 2^-126, subnormal or not.
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def fp4_groups(x, GROUPS: tl.constexpr):
    """Vectors [n, GROUPS * 32] float32 to (values divided by their scales [n, GROUPS, 32], E8M0 bytes [n, GROUPS])."""
    groups = tl.reshape(x, [x.shape[0], GROUPS, 32])
    byte = scale_byte(tl.max(tl.abs(groups), axis=2), 7.052966104933725e-38, 6.0)
    return groups * power(254 - byte)[:, :, None], byte
