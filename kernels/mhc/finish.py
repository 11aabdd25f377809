"""The end of a boundary, which needs whole rows: mixes, Sinkhorn, merged streams, RMSNorm, E4M3."""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.dependent import wait_for_previous
from dsv4_kernels.quant.device import inverse_power_of_two, scale_exponent, store_scales


@triton.jit
def _entry(table, index, at: tl.constexpr):
    """One number of a table."""
    return tl.sum(tl.sum(tl.where(index == at, table, 0.0), axis=1), axis=0)


@triton.jit
def finish_token(
    token,  # int64
    streams,  # [tokens, 4, hidden]
    partials,  # f32 [tokens, slices, 32]; lane 24 is a sum of squares
    squares,  # f32 [tokens], with HAS_SQUARES: what lane 24 lacks
    base,
    scale,
    norm,  # f32 [hidden]
    x,  # [tokens, hidden]
    codes,  # e4m3 [tokens, hidden]
    exponents,  # uint8 [tokens, hidden / 128], strides 1 and exponent_step
    row_scales,  # of `store_scales`
    post,  # f32 [tokens, 4]
    comb,  # f32 [tokens, 4, 4]
    hidden,
    num_slices,
    exponent_step,
    hc_eps,
    norm_eps,
    ITERATIONS: tl.constexpr,  # of Sinkhorn; 0 = the final collapse, which gives x alone
    SLICES: tl.constexpr,  # num_slices padded to a power of two
    GROUPS: tl.constexpr,  # of 128 hidden dims, padded to a power of two
    HAS_SQUARES: tl.constexpr,
):
    """All that needs a whole row."""
    group = tl.arange(0, GROUPS)
    dim = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = dim < hidden
    # All of this comes while Sinkhorn runs, which takes longer.
    at = streams + token * 4 * hidden + dim
    s0 = tl.load(at, mask=inside, other=0.0)
    s1 = tl.load(at + hidden, mask=inside, other=0.0)
    s2 = tl.load(at + 2 * hidden, mask=inside, other=0.0)
    s3 = tl.load(at + 3 * hidden, mask=inside, other=0.0)

    weight = tl.load(norm + dim, mask=inside, other=0.0)
    # As rows of four: pre, post, four of comb, the sum of squares and three zeros, four zeros.
    index = tl.arange(0, 8)[:, None] * 4 + tl.arange(0, 4)[None, :]
    is_mix = index < (24 if ITERATIONS > 0 else 4)
    factor = tl.load(scale + index, mask=is_mix, other=0.0)
    offset = tl.load(base + index, mask=is_mix, other=0.0)
    part = tl.arange(0, SLICES)[:, None]
    lane = tl.arange(0, 32)[None, :]
    sums = tl.load(partials + (token * num_slices + part) * 32 + lane, mask=part < num_slices, other=0.0)
    sums = tl.reshape(tl.sum(sums, axis=0), (8, 4))
    square = _entry(sums, index, 24)
    if HAS_SQUARES:
        square += tl.load(squares + token)
    inverse = 1.0 / tl.sqrt(square / (4 * hidden) + norm_eps)
    mixes = sums * inverse * factor + offset
    gates = tl.sigmoid(mixes)
    if ITERATIONS > 0:
        tl.store(post + token * 4 + index - 4, 2.0 * gates, mask=(index >= 4) & (index < 8))
        in_comb = (index >= 8) & (index < 24)
        mixing = tl.exp(mixes - tl.max(mixes, axis=1)[:, None])
        mixing = tl.where(in_comb, mixing / tl.sum(mixing, axis=1)[:, None] + hc_eps, 0.0)
        mixing = mixing / (tl.sum(mixing, axis=0)[None, :] + hc_eps)
        for _ in range(ITERATIONS - 1):
            mixing = mixing / (tl.sum(mixing, axis=1)[:, None] + hc_eps)
            mixing = mixing / (tl.sum(mixing, axis=0)[None, :] + hc_eps)
        tl.store(comb + token * 16 + index - 8, mixing, mask=in_comb)

    merged = (_entry(gates, index, 0) + hc_eps) * s0.to(tl.float32)
    merged += (_entry(gates, index, 1) + hc_eps) * s1.to(tl.float32)
    merged += (_entry(gates, index, 2) + hc_eps) * s2.to(tl.float32)
    merged += (_entry(gates, index, 3) + hc_eps) * s3.to(tl.float32)
    merged = merged.to(streams.dtype.element_ty).to(tl.float32)
    variance = tl.sum(tl.sum(merged * merged, axis=1), axis=0) / hidden
    normed = merged * (1.0 / tl.sqrt(variance + norm_eps)) * weight
    normed = normed.to(x.dtype.element_ty)
    tl.store(x + token * hidden + dim, normed, mask=inside)
    if ITERATIONS > 0:
        values = normed.to(tl.float32)
        exponent = scale_exponent(values, 1, FP4=False)
        values = values * inverse_power_of_two(exponent)[:, None]
        tl.store(codes + token * hidden + dim, values.to(codes.dtype.element_ty), mask=inside)
        store_scales(exponents, row_scales, token + group * exponent_step, exponent, group * 128 < hidden)


@triton.jit(do_not_specialize=["exponent_step"])
def finish_tokens(
    streams,
    partials,
    squares,
    base,
    scale,
    norm,
    x,
    codes,
    exponents,
    row_scales,
    post,
    comb,
    hidden,
    num_slices,
    exponent_step,
    hc_eps,
    norm_eps,
    ITERATIONS: tl.constexpr,
    SLICES: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
):
    """A token each program."""
    wait_for_previous()
    finish_token(
        tl.program_id(0).to(tl.int64), streams, partials, squares, base, scale, norm, x, codes, exponents, row_scales,
        post, comb, hidden, num_slices, exponent_step, hc_eps, norm_eps, ITERATIONS, SLICES, GROUPS, HAS_SQUARES,
    )  # fmt: skip
