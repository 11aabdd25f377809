"""Hyper-connections in Triton: the boundary between two sublayers in two launches, and the final collapse.

Equal to `mhc_post`, `mhc_pre` and `rms_norm` of the references, one after the other.

Launch 1 (`_mix`) forms the new streams, slice by slice of the hidden size, and the partial sums of their mix logits.
The slices do not depend on the number of tokens, so with tiles of one size a token has the same bits in any batch.
Launch 2 (`_finish`) adds the slices, runs Sinkhorn in registers, merges the streams and applies the RMSNorm. What it
reads of the streams was just written: 57 KB a token on Pro, from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STREAMS = 4  # c of every released model; the kernels are written out for it
MIX_LANES = 32  # 2c + c * c = 24 mixes and, in lane 24, the sum of squares; padded to a power of two
SLICE = 512  # hidden dims of one program of `_mix`
BLOCK_D = 32  # of them in one product


@triton.jit
def _add(streams, output, post, comb, token, inside, at, keep, hidden, J: tl.constexpr):
    """New stream J of a tile [tokens, dims]: post_J * output + sum_i comb[i, J] * stream_i, float32."""
    value = tl.load(post + token * 4 + J, mask=inside, other=0.0)[:, None] * output
    for i in tl.static_range(4):
        weight = tl.load(comb + token * 16 + i * 4 + J, mask=inside, other=0.0)[:, None]
        value += weight * tl.load(streams + at + i * hidden, mask=keep, other=0.0).to(tl.float32)
    return value


@triton.jit
def _mix(
    streams,  # [tokens, 4, hidden]
    output,  # [tokens, hidden], with HAS_OUTPUT
    post,  # f32 [tokens, 4]
    comb,  # f32 [tokens, 4, 4]
    fn,  # f32 [mixes, 4 * hidden], strides fn_row and fn_column
    new_streams,  # like streams, with HAS_OUTPUT
    partials,  # f32 [tokens, slices, 32]
    num_tokens,
    hidden,
    num_mixes,
    fn_row,
    fn_column,
    HAS_OUTPUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICE_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    inside = token < num_tokens
    lane = tl.arange(0, 32)
    sums = tl.zeros([BLOCK_T, 32], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    for block in range(SLICE_D // BLOCK_D):
        dim = part * SLICE_D + block * BLOCK_D + tl.arange(0, BLOCK_D)
        keep = inside[:, None] & (dim < hidden)[None, :]
        at = token[:, None] * 4 * hidden + dim[None, :]
        if HAS_OUTPUT:
            added = tl.load(output + token[:, None] * hidden + dim[None, :], mask=keep, other=0.0).to(tl.float32)
        for j in tl.static_range(4):
            if HAS_OUTPUT:
                value = _add(streams, added, post, comb, token, inside, at, keep, hidden, j)
                value = value.to(streams.dtype.element_ty)
                tl.store(new_streams + at + j * hidden, value, mask=keep)
            else:
                value = tl.load(streams + at + j * hidden, mask=keep, other=0.0)
            value = value.to(tl.float32)
            squares += tl.sum(value * value, axis=1)
            column = (j * hidden + dim).to(tl.int64)
            weights = tl.load(
                fn + lane[None, :] * fn_row + column[:, None] * fn_column,
                mask=(dim < hidden)[:, None] & (lane < num_mixes)[None, :],
                other=0.0,
            )
            sums = tl.dot(value, weights, sums, input_precision="tf32x3")
    sums = tl.where((lane == 24)[None, :], squares[:, None], sums)
    row = partials + (token * tl.num_programs(1) + part)[:, None] * 32
    tl.store(row + lane[None, :], sums, mask=inside[:, None])


@triton.jit
def _gate(partial, keep, inverse, scale, base, index):
    """One mix logit: the sum of its slices, normalised, scaled and shifted."""
    return tl.sum(tl.load(partial + index, mask=keep, other=0.0)) * inverse * tl.load(scale + index) + tl.load(
        base + index
    )


@triton.jit
def _finish(
    streams,  # [tokens, 4, hidden]
    partials,  # f32 [tokens, slices, 32]
    base,
    scale,
    norm,  # f32 [hidden]
    x,  # [tokens, hidden]
    post,  # f32 [tokens, 4]
    comb,  # f32 [tokens, 4, 4]
    hidden,
    num_slices,
    hc_eps,
    norm_eps,
    ITERATIONS: tl.constexpr,  # of Sinkhorn; 0 = the final collapse, which has neither post nor comb
    SLICES: tl.constexpr,  # num_slices padded to a power of two
    BLOCK: tl.constexpr,  # hidden padded to a power of two
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SLICES)
    keep = part < num_slices
    partial = partials + (token * num_slices + part) * 32
    mean = tl.sum(tl.load(partial + 24, mask=keep, other=0.0)) / (4 * hidden)
    inverse = 1.0 / tl.sqrt(mean + norm_eps)
    dim = tl.arange(0, BLOCK)
    inside = dim < hidden
    merged = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(4):
        weight = tl.sigmoid(_gate(partial, keep, inverse, scale, base, i)) + hc_eps
        merged += weight * tl.load(streams + token * 4 * hidden + i * hidden + dim, mask=inside, other=0.0).to(
            tl.float32
        )
    merged = merged.to(streams.dtype.element_ty).to(tl.float32)
    variance = tl.sum(merged * merged) / hidden
    normed = merged * (1.0 / tl.sqrt(variance + norm_eps)) * tl.load(norm + dim, mask=inside, other=0.0)
    tl.store(x + token * hidden + dim, normed.to(x.dtype.element_ty), mask=inside)
    if ITERATIONS > 0:
        for i in tl.static_range(4):
            tl.store(post + token * 4 + i, 2.0 * tl.sigmoid(_gate(partial, keep, inverse, scale, base, 4 + i)))
        row, column = tl.arange(0, 4)[:, None], tl.arange(0, 4)[None, :]
        index = 8 + row * 4 + column
        logits = tl.zeros([4, 4], tl.float32)
        for slice_ in range(num_slices):
            logits += tl.load(partials + (token * num_slices + slice_) * 32 + index)
        logits = logits * inverse * tl.load(scale + index) + tl.load(base + index)
        mixing = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        mixing = mixing / tl.sum(mixing, axis=1)[:, None] + hc_eps
        mixing = mixing / (tl.sum(mixing, axis=0)[None, :] + hc_eps)
        for _ in range(ITERATIONS - 1):
            mixing = mixing / (tl.sum(mixing, axis=1)[:, None] + hc_eps)
            mixing = mixing / (tl.sum(mixing, axis=0)[None, :] + hc_eps)
        tl.store(comb + token * 16 + row * 4 + column, mixing)


def mhc_boundary(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    *,
    sinkhorn_iters: int,
    hc_eps: float,
    norm_eps: float,
    output: Tensor | None = None,
    post: Tensor | None = None,
    comb: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The end of one sublayer and the start of the next.

    Args:
        streams: [T, 4, D] contiguous, bfloat16 or float32; fn, base, scale: of `mhc_pre`, fn of any strides.
        norm: f32 [D], weight of the RMSNorm of the sublayer's input.
        output, post, comb: the finished sublayer's output [T, D] and what `mhc_pre` gave for it; None at the start.

    Returns:
        New streams (the given ones without `output`), normed input x [T, D], post f32 [T, 4], comb f32 [T, 4, 4].

    Raises ValueError for other numbers of streams.
    """
    new_streams = streams if output is None else torch.empty_like(streams)
    partials = _partials(streams, fn, new_streams, output, post, comb)
    num_tokens = streams.shape[0]
    new_post = torch.empty(num_tokens, STREAMS, device=streams.device, dtype=torch.float32)
    new_comb = torch.empty(num_tokens, STREAMS, STREAMS, device=streams.device, dtype=torch.float32)
    x = _merge(new_streams, partials, base, scale, norm, new_post, new_comb, sinkhorn_iters, hc_eps, norm_eps)
    return new_streams, x, new_post, new_comb


def mhc_head(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    *,
    hc_eps: float,
    norm_eps: float,
    output: Tensor | None = None,
    post: Tensor | None = None,
    comb: Tensor | None = None,
) -> Tensor:
    """The final collapse and its RMSNorm [T, D]: `reference.mhc_head` with `fn` [c, c * D], then `rms_norm`.

    output, post, comb: of the last sublayer, which `mhc_post` has not added to the streams yet; None if it has.
    """
    new_streams = streams if output is None else torch.empty_like(streams)
    partials = _partials(streams, fn, new_streams, output, post, comb)
    weights = scale.expand(STREAMS).contiguous()
    return _merge(new_streams, partials, base, weights, norm, None, None, 0, hc_eps, norm_eps)


def _partials(
    streams: Tensor, fn: Tensor, new_streams: Tensor, output: Tensor | None, post: Tensor | None, comb: Tensor | None
) -> Tensor:
    num_tokens, num_streams, hidden = streams.shape
    if num_streams != STREAMS or not streams.is_contiguous():
        raise ValueError(f"mhc: streams are {list(streams.shape)}; the Triton kernels take contiguous [T, 4, D]")
    num_slices = triton.cdiv(hidden, SLICE)
    partials = torch.empty(num_tokens, num_slices, MIX_LANES, device=streams.device, dtype=torch.float32)
    if num_tokens:
        # The largest tiles that keep everything in registers (tests/kernels/test_compile_gate.py).
        block, num_warps, num_stages = (16, 4, 3) if num_tokens <= 64 else (64, 8, 2)
        _mix[(triton.cdiv(num_tokens, block), num_slices)](
            streams,
            streams if output is None else output,
            partials if post is None else post,
            partials if comb is None else comb,
            fn,
            new_streams,
            partials,
            num_tokens,
            hidden,
            fn.shape[0],
            fn.stride(0),
            fn.stride(1),
            HAS_OUTPUT=output is not None,
            BLOCK_T=block,
            BLOCK_D=BLOCK_D,
            SLICE_D=min(SLICE, triton.cdiv(hidden, BLOCK_D) * BLOCK_D),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return partials


def _merge(
    streams: Tensor,
    partials: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    post: Tensor | None,
    comb: Tensor | None,
    sinkhorn_iters: int,
    hc_eps: float,
    norm_eps: float,
) -> Tensor:
    num_tokens, _, hidden = streams.shape
    x = torch.empty(num_tokens, hidden, device=streams.device, dtype=streams.dtype)
    if num_tokens:
        _finish[(num_tokens,)](
            streams,
            partials,
            base,
            scale,
            norm,
            x,
            partials if post is None else post,
            partials if comb is None else comb,
            hidden,
            partials.shape[1],
            hc_eps,
            norm_eps,
            ITERATIONS=sinkhorn_iters,
            SLICES=triton.next_power_of_2(partials.shape[1]),
            BLOCK=triton.next_power_of_2(hidden),
            num_warps=8,
        )
    return x
