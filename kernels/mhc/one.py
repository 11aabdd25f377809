"""The boundary of up to four tokens in one launch. A program has a slice of one token: it adds over registers, where
tensor cores would multiply fifteen rows of nothing.

The last program of a token goes on to x. Meanwhile another one, which has waited for it, makes post and comb.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.arrival import announce, is_last, wait_for
from dsv4_kernels.dependent import wait_for_previous
from dsv4_kernels.mhc.finish import finish_token


# Not compiled anew for other numbers of tokens.
@triton.jit(do_not_specialize=["exponent_step"])
def mix_one(
    streams,  # [tokens, 4, hidden]
    output,  # [tokens, PARTS, hidden], with PARTS > 0
    old_post,  # f32 [tokens, 4]
    old_comb,  # f32 [tokens, 4, 4]
    fn,  # f32 [mixes, 4 * hidden], strides fn_row and fn_column
    new_streams,  # like streams, with PARTS > 0
    fn_row,
    fn_column,
    counts,  # int32 [2, tokens], zero: of slices; with ITERATIONS, flags
    partials,  # from here on of `finish_token`
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
    exponent_step,
    hc_eps,
    norm_eps,
    PARTS: tl.constexpr,
    DIMS: tl.constexpr,
    ITERATIONS: tl.constexpr,
    SLICES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A slice of DIMS hidden dims of one token each program, and with ITERATIONS one more program a token."""
    wait_for_previous()
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_slices = tl.num_programs(1) - (1 if ITERATIONS > 0 else 0)
    flag = counts + tl.num_programs(0) + tl.program_id(0)
    if ITERATIONS > 0:  # noqa: SIM102  # a constant, then a value
        if part == num_slices:
            wait_for(flag)
            finish_token(
                token, new_streams, partials, partials, base, scale, norm, x, codes, exponents, row_scales, post, comb,
                hidden, num_slices, exponent_step, hc_eps, norm_eps, ITERATIONS, SLICES, GROUPS, False, False, True,
            )  # fmt: skip
            return
    dim, stream, lane = part * DIMS + tl.arange(0, DIMS), tl.arange(0, 4), tl.arange(0, 32)
    inside = dim < hidden
    column = stream[:, None] * hidden + dim[None, :]
    weights = tl.load(
        fn + lane[:, None, None] * fn_row + column.to(tl.int64)[None, :, :] * fn_column,
        mask=(lane < (24 if ITERATIONS > 0 else 4))[:, None, None] & inside[None, None, :],
        other=0.0,
    )
    rows = token * 4 * hidden
    if PARTS > 0:
        added = tl.zeros([DIMS], tl.float32)
        for n in tl.static_range(PARTS):
            added += tl.load(output + (token * PARTS + n) * hidden + dim, mask=inside, other=0.0).to(tl.float32)
        added = added.to(output.dtype.element_ty).to(tl.float32)
        value = tl.load(old_post + token * 4 + stream)[:, None] * added[None, :]
        for i in tl.static_range(4):
            old = tl.load(streams + rows + i * hidden + dim, mask=inside, other=0.0).to(tl.float32)
            value += tl.load(old_comb + token * 16 + i * 4 + stream)[:, None] * old[None, :]
        value = value.to(streams.dtype.element_ty)
        tl.store(new_streams + rows + column, value, mask=inside[None, :])
    else:
        value = tl.load(streams + rows + column, mask=inside[None, :], other=0.0)
    exact = value.to(tl.float32)[None, :, :]
    weights = tl.where((lane == 24)[:, None, None], exact, weights)  # this lane is the sum of squares
    sums = tl.sum(tl.sum(weights * exact, axis=2), axis=1)
    tl.store(partials + (token * num_slices + part) * 32 + lane, sums)
    if is_last(counts + tl.program_id(0), num_slices):
        if ITERATIONS > 0:
            announce(flag)
        finish_token(
            token, new_streams, partials, partials, base, scale, norm, x, codes, exponents, row_scales, post, comb,
            hidden, num_slices, exponent_step, hc_eps, norm_eps, ITERATIONS, SLICES, GROUPS, False, True, False,
        )  # fmt: skip
