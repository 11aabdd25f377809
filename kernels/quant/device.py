"""Quantisation in registers: the device functions that the Triton kernels of all operations share.

Bit-equal to reference.py (docs/model.md section 9). Scales are 2^(exponent - 127), the exponent an E8M0 byte as int32.
A NaN or an infinity in a group gives it the exponent 255, NaN, as in the reference, so it survives; the codes beside
such a scale mean nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.rope.device import split_pairs


@triton.jit
def scale_exponent(values, axis: tl.constexpr, FP4: tl.constexpr):
    """Exponents of the power-of-two scales that FP8 or FP4 gives the groups along `axis` of f32 values."""
    return exponent_of(most_bits(values, axis), FP4)


@triton.jit
def most_bits(values, axis: tl.constexpr):
    """int32 bits of the largest magnitudes along `axis` of f32 values.

    The maximum is taken over integers: the bits of magnitudes have their order, and NaN is above all.
    """
    return tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis)


@triton.jit
def exponent_of(bits, FP4: tl.constexpr):
    """Exponents of the scales of groups whose `most_bits` are these."""
    if FP4:  # floors of reference.py as bits: 6 * 2^-126 and 1e-4
        least = tl.maximum(bits, 0x01C00000).to(tl.float32, bitcast=True) * (1.0 / 6.0)
    else:
        least = tl.maximum(bits, 0x38D1B717).to(tl.float32, bitcast=True) * (1.0 / 448.0)
    bits = tl.minimum(least.to(tl.int32, bitcast=True), 0x7F800000)  # NaN as infinity: its bits must not overflow
    return (bits + 0x7FFFFF) >> 23


@triton.jit
def power_of_two(exponent):
    """float32 2^(exponent - 127) of E8M0 bytes in any integer type; 0 is zero."""
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power_of_two(exponent):
    """float32 2^(127 - exponent) of int32; the product with it is the quotient, exactly. 255 is zero."""
    return power_of_two(tl.maximum(254 - exponent, 0))


@triton.jit
def store_scales(exponents, scales, at, exponent, mask):
    """Store E8M0 bytes at `exponents`, and what they stand for at `scales` if those are float32."""
    tl.store(exponents + at, exponent.to(tl.uint8), mask=mask)
    if scales.dtype.element_ty == tl.float32:
        tl.store(scales + at, power_of_two(exponent), mask=mask)


@triton.jit
def scaled_groups(values, GROUP: tl.constexpr, FP4: tl.constexpr):
    """f32 [rows, columns] to (values over their scales [rows, groups, GROUP], exponents [rows, groups])."""
    groups = tl.reshape(values, (values.shape[0], values.shape[1] // GROUP, GROUP))
    exponents = scale_exponent(groups, 2, FP4)
    return groups * inverse_power_of_two(exponents)[:, :, None], exponents


@triton.jit
def e2m1_codes(values):
    """FP4 codes int32 of f32 values of magnitude up to 6: to nearest, ties to the even code; -0 keeps its sign."""
    size = tl.abs(values)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | ((values.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def e2m1_values(codes):
    """f32 values of FP4 codes int32 (the low four bits)."""
    # Exponent and mantissa at the bottom of a float32's exponent field are the value times 2^-126, subnormal or not.
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def e2m1_bytes(values):
    """FP4 codes of f32 values [n, d] or [d], two a byte, the even element in the low nibble: uint8 [.., d / 2]."""
    low, high = split_pairs(e2m1_codes(values))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def _signs(both):
    """float32 signs of a Hadamard matrix, of row & column: the parity of the byte, read from a table of 16 nibbles."""
    return (1 - 2 * ((0x6996 >> ((both ^ (both >> 4)) & 15)) & 1)).to(tl.float32)


@triton.jit
def hadamard(x, DIM: tl.constexpr):
    """Walsh-Hadamard transform of bfloat16 vectors [n >= 16, DIM], Sylvester order, times DIM^-0.5, in bfloat16."""
    signs = _signs(tl.arange(0, DIM)[:, None] & tl.arange(0, DIM)[None, :])
    return (tl.dot(x, signs.to(tl.bfloat16)) * (1.0 / (DIM**0.5))).to(tl.bfloat16)


@triton.jit
def hadamard_one(x, DIM: tl.constexpr):
    """The same of one vector [DIM], DIM at least 32, in float32, without tensor cores.

    The matrix is the Kronecker product of those of DIM / 32 and of 32, so no sum has more than 32 terms.
    """
    row, part = tl.arange(0, 32), tl.arange(0, DIM // 32)
    turned = tl.sum(tl.reshape(x, (DIM // 32, 1, 32)) * _signs(row[:, None] & row[None, :])[None, :, :], axis=2)
    turned = tl.sum(turned[None, :, :] * _signs(part[:, None] & part[None, :])[:, :, None], axis=1)
    return tl.reshape(turned, (DIM,)) * (1.0 / (DIM**0.5))
