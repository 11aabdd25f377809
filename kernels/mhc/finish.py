"""The end of a boundary, which needs whole rows: mixes, Sinkhorn, merged streams, RMSNorm, E4M3.

Two results come of the mixes and need nothing of each other: what the sublayer reads (merged, normed, rounded), and
how its output will be added (post and comb, by Sinkhorn). Either takes one program about 4 us.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.dependent import wait_for_previous
from dsv4_kernels.quant.device import inverse_power_of_two, scale_exponent, store_scales


@triton.jit
def _entry(table, index, at: tl.constexpr):
    """One number of a table."""
    return tl.sum(tl.sum(tl.where(index == at, table, 0.0), axis=1), axis=0)


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _reciprocal(value):
    """To the last bit but one, in one instruction of the unit that limits Sinkhorn; a division takes several more."""
    if INTERPRETED:
        return 1.0 / value
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _add_up(k0, k1, k2, k3, x0, x1, x2, x3, old, eps):
    """The reciprocal of a row's or column's scaling: its entries under those of the others, and what eps keeps."""
    return k0 * x0 + k1 * x1 + (k2 * x2 + k3 * x3) + eps * old


@triton.jit
def _sinkhorn(table, index, eps, ITERATIONS: tl.constexpr):
    """Entries 8 to 23 of the table, 4 x 4 after row softmax and + eps, made doubly stochastic: `reference.sinkhorn`.

    Each thread has all 16 entries and works by itself: 39 sums, one after the other, over registers. Over lanes each of
    them would wait for two or three shuffles.
    """
    k00, k01 = _entry(table, index, 8), _entry(table, index, 9)
    k02, k03 = _entry(table, index, 10), _entry(table, index, 11)
    k10, k11 = _entry(table, index, 12), _entry(table, index, 13)
    k12, k13 = _entry(table, index, 14), _entry(table, index, 15)
    k20, k21 = _entry(table, index, 16), _entry(table, index, 17)
    k22, k23 = _entry(table, index, 18), _entry(table, index, 19)
    k30, k31 = _entry(table, index, 20), _entry(table, index, 21)
    k32, k33 = _entry(table, index, 22), _entry(table, index, 23)
    one = tl.full([], 1.0, tl.float32)
    r0, r1, r2, r3 = one, one, one, one  # reciprocals of the scalings of rows,
    c0 = k00 + k10 + (k20 + k30) + eps  # and of columns
    c1 = k01 + k11 + (k21 + k31) + eps
    c2 = k02 + k12 + (k22 + k32) + eps
    c3 = k03 + k13 + (k23 + k33) + eps
    for _ in range(ITERATIONS - 1):
        x0, x1, x2, x3 = _reciprocal(c0), _reciprocal(c1), _reciprocal(c2), _reciprocal(c3)
        r0 = _add_up(k00, k01, k02, k03, x0, x1, x2, x3, r0, eps)
        r1 = _add_up(k10, k11, k12, k13, x0, x1, x2, x3, r1, eps)
        r2 = _add_up(k20, k21, k22, k23, x0, x1, x2, x3, r2, eps)
        r3 = _add_up(k30, k31, k32, k33, x0, x1, x2, x3, r3, eps)
        x0, x1, x2, x3 = _reciprocal(r0), _reciprocal(r1), _reciprocal(r2), _reciprocal(r3)
        c0 = _add_up(k00, k10, k20, k30, x0, x1, x2, x3, c0, eps)
        c1 = _add_up(k01, k11, k21, k31, x0, x1, x2, x3, c1, eps)
        c2 = _add_up(k02, k12, k22, k32, x0, x1, x2, x3, c2, eps)
        c3 = _add_up(k03, k13, k23, k33, x0, x1, x2, x3, c3, eps)
    row, column = index // 4, index % 4
    of_row = tl.where(row == 2, r0, tl.where(row == 3, r1, tl.where(row == 4, r2, r3)))
    of_column = tl.where(column == 0, c0, tl.where(column == 1, c1, tl.where(column == 2, c2, c3)))
    return table / (of_row * of_column)


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
    X: tl.constexpr,  # whether x is made,
    COMB: tl.constexpr,  # and whether post and comb are
):
    """What needs a whole row: x, post and comb, or either."""
    if X:
        group = tl.arange(0, GROUPS)
        dim = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        inside = dim < hidden
        # All of this comes while the mixes are made.
        at = streams + token * 4 * hidden + dim
        s0 = tl.load(at, mask=inside, other=0.0)
        s1 = tl.load(at + hidden, mask=inside, other=0.0)
        s2 = tl.load(at + 2 * hidden, mask=inside, other=0.0)
        s3 = tl.load(at + 3 * hidden, mask=inside, other=0.0)

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
    if COMB:
        tl.store(post + token * 4 + index - 4, 2.0 * gates, mask=(index >= 4) & (index < 8))
        in_comb = (index >= 8) & (index < 24)
        mixing = tl.exp(mixes - tl.max(mixes, axis=1)[:, None])
        mixing = _sinkhorn(mixing / tl.sum(mixing, axis=1)[:, None] + hc_eps, index, hc_eps, ITERATIONS)
        tl.store(comb + token * 16 + index - 8, mixing, mask=in_comb)

    if X:
        # Comes while rows are merged; earlier it would cost registers.
        weight = tl.load(norm + dim, mask=inside, other=0.0)
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
        post, comb, hidden, num_slices, exponent_step, hc_eps, norm_eps, ITERATIONS, SLICES, GROUPS, HAS_SQUARES, True,
        ITERATIONS > 0,
    )  # fmt: skip
