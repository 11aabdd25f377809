"""Hyper-connections in Triton: the boundary between two sublayers, and the final collapse.

Equal to `mhc_post`, `mhc_pre`, `rms_norm` and `quantize_rows` of the references, one after the other.

`_mix` adds up the parts of a sublayer's output and forms the new streams, slice by slice of the hidden size, and the
partial sums of their mix logits. What follows needs whole rows (`finish_token`): it adds the slices, runs Sinkhorn,
merges the streams, applies the RMSNorm and quantises. What it reads of the streams was just written: 57 KB a token on
Pro, from L2. For up to four tokens two programs of the same launch do it (`one.py`); for more a second launch
with a program for each token, because the last program of a tile would do its tokens one after the other.

Many tokens do the first half in another way (`many.py`). Tiles depend on the number of tokens and the hidden size; with
fixed ones (`tiles=`) a token has the same bits in any batch, so in deterministic mode all steps have those of FIXED.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.arrival import counters
from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.deterministic import is_deterministic
from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows
from dsv4_kernels.gemm.quantize import empty_rows
from dsv4_kernels.mhc.finish import finish_tokens
from dsv4_kernels.mhc.many import LANES, mix_many
from dsv4_kernels.mhc.one import mix_one

STREAMS = 4  # c of every released model; the kernels are written out for it
BLOCK_D = 32  # hidden dims of one product
PROGRAMS = 132  # at most, while slices can grow: one for each multiprocessor
MAX_SLICE = 512
FEW = 4  # most tokens whose tiles have one token; 3 and 4 have two programs for each multiprocessor
MANY = 256  # tokens from which on the other way is faster


# By tokens of a tile; what keeps everything in registers (tests/kernels/test_compile_gate.py).
WARPS_STAGES = {16: (8, 3), 64: (8, 2)}


class Tiles(NamedTuple):
    """What one program of `_mix` takes; all results of equal tiles are equal in their bits."""

    tokens: int  # 1, 16 or 64; 1: without a second launch
    dims: int  # of the hidden size, a multiple of 32


# In deterministic mode. On Pro 56 programs for one token, 7 KB of partial sums a token. Tiles of other numbers of
# tokens have other matrix instructions and add in other orders.
FIXED = Tiles(16, 128)


def tiles_for(num_tokens: int, hidden: int) -> Tiles:
    """The smallest slices with which each multiprocessor has no more than one program, or two of some tokens."""
    if is_deterministic():
        return FIXED
    tokens = 1 if num_tokens <= FEW else 16 if num_tokens <= 64 else 64
    most = 2 * PROGRAMS if 2 < num_tokens <= FEW else PROGRAMS
    dims = BLOCK_D
    while dims < MAX_SLICE and triton.cdiv(num_tokens, tokens) * triton.cdiv(hidden, dims) > most:
        dims *= 2
    return Tiles(tokens, dims)


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _once(values):
    """The values themselves. The compiler would compute them twice, for a store and a product that read them."""
    if INTERPRETED:
        return values
    PACK: tl.constexpr = 32 // values.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], dtype=values.dtype, is_pure=False, pack=PACK)


@triton.jit
def _add(s0, s1, s2, s3, output, post, comb, token, inside, J: tl.constexpr):
    """New stream J of a tile [tokens, dims]: post_J * output + sum_i comb[i, J] * stream_i, float32."""
    post += token * 4 + J
    comb += token * 16 + J
    value = tl.load(post, mask=inside, other=0.0)[:, None] * output
    value += tl.load(comb, mask=inside, other=0.0)[:, None] * s0
    value += tl.load(comb + 4, mask=inside, other=0.0)[:, None] * s1
    value += tl.load(comb + 8, mask=inside, other=0.0)[:, None] * s2
    return value + tl.load(comb + 12, mask=inside, other=0.0)[:, None] * s3


# Not compiled anew for other numbers of tokens.
@triton.jit(do_not_specialize=["num_tokens"])
def _mix(
    streams,  # [tokens, 4, hidden]
    output,  # [tokens, PARTS, hidden], with PARTS > 0
    old_post,  # f32 [tokens, 4]
    old_comb,  # f32 [tokens, 4, 4]
    fn,  # f32 [mixes, 4 * hidden], strides fn_row and fn_column
    new_streams,  # like streams, with PARTS > 0
    num_tokens,
    fn_row,
    fn_column,
    partials,  # f32 [tokens, slices, 32]; lane 24 is a sum of squares
    hidden,
    PARTS: tl.constexpr,
    MIXES: tl.constexpr,
    TOKENS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_previous()
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    part, num_slices = tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, 32)
    sums = tl.zeros([TOKENS, 32], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    for block in range(DIMS // BLOCK_D):
        dim = part * DIMS + block * BLOCK_D + tl.arange(0, BLOCK_D)
        keep = inside[:, None] & (dim < hidden)[None, :]
        at = token[:, None] * 4 * hidden + dim[None, :]
        if PARTS > 0:
            s0 = tl.load(streams + at, mask=keep, other=0.0).to(tl.float32)
            s1 = tl.load(streams + at + hidden, mask=keep, other=0.0).to(tl.float32)
            s2 = tl.load(streams + at + 2 * hidden, mask=keep, other=0.0).to(tl.float32)
            s3 = tl.load(streams + at + 3 * hidden, mask=keep, other=0.0).to(tl.float32)
            added = tl.zeros([TOKENS, BLOCK_D], tl.float32)
            for n in tl.static_range(PARTS):
                part_at = (token * PARTS + n)[:, None] * hidden + dim[None, :]
                added += tl.load(output + part_at, mask=keep, other=0.0).to(tl.float32)
            added = added.to(output.dtype.element_ty).to(tl.float32)
        for j in tl.static_range(4):
            if PARTS > 0:
                value = _add(s0, s1, s2, s3, added, old_post, old_comb, token, inside, j)
                value = _once(value.to(streams.dtype.element_ty))
                tl.store(new_streams + at + j * hidden, value, mask=keep)
            else:
                value = tl.load(streams + at + j * hidden, mask=keep, other=0.0)
            exact = value.to(tl.float32)
            squares += tl.sum(exact * exact, axis=1)
            column = (j * hidden + dim).to(tl.int64)
            weights = tl.load(
                fn + lane[None, :] * fn_row + column[:, None] * fn_column,
                mask=(dim < hidden)[:, None] & (lane < MIXES)[None, :],
                other=0.0,
            )
            if value.dtype == tl.bfloat16:
                # Three bfloat16 hold the 24 bits of a float32, and a product of two is exact.
                for _ in tl.static_range(3):
                    term = weights.to(tl.bfloat16)
                    sums = tl.dot(value, term, sums)
                    weights -= term.to(tl.float32)
            else:
                sums = tl.dot(value, weights, sums, input_precision="tf32x3")
    sums = tl.where((lane == 24)[None, :], squares[:, None], sums)
    tl.store(partials + (token * num_slices + part)[:, None] * 32 + lane[None, :], sums, mask=inside[:, None])


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
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Fp8Rows, Tensor, Tensor]:
    """The end of one sublayer and the start of the next.

    Args:
        streams: [T, 4, D] contiguous, bfloat16 or float32; fn, base, scale: of `mhc_pre`, fn of any strides.
        norm: f32 [D], weight of the RMSNorm of the sublayer's input.
        output: of the finished sublayer, in the streams' dtype, contiguous: [T, D], or [T, N, D], N parts that are
            added in their order in float32 and rounded once. None at the start.
        post, comb: what this function gave for that sublayer.
        tiles: chosen from the shapes by default.

    Returns:
        New streams (the given ones without `output`), normed input x [T, D], `quantize_rows(x)`, post f32 [T, 4],
        comb f32 [T, 4, 4].

    Raises ValueError for other numbers of streams, and unless D is a multiple of 128.
    """
    num_tokens, _, hidden = streams.shape
    if hidden % GROUP:
        raise ValueError(f"mhc: streams are {list(streams.shape)}; expected D a multiple of {GROUP}")
    rows = empty_rows(num_tokens, hidden, streams.device, scales=True)
    new_post = torch.empty(num_tokens, STREAMS, device=streams.device, dtype=torch.float32)
    new_comb = torch.empty(num_tokens, STREAMS, STREAMS, device=streams.device, dtype=torch.float32)
    new_streams, x = _launch(
        streams, fn, base, scale, norm, output, post, comb, (rows, new_post, new_comb), sinkhorn_iters, hc_eps,
        norm_eps, tiles,
    )  # fmt: skip
    return new_streams, x, rows, new_post, new_comb


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
) -> tuple[Tensor, Tensor]:
    """The final collapse and its RMSNorm: `reference.mhc_head` with `fn` [c, c * D], then `rms_norm`.

    output, post, comb: of the last sublayer, as `mhc_boundary` takes them; None if `mhc_post` has added it already.

    Returns the streams [T, c, D] with that output, the given ones if there is none, and what they collapse to [T, D].
    """
    scale = scale.expand(STREAMS).contiguous()
    return _launch(streams, fn, base, scale, norm, output, post, comb, None, 0, hc_eps, norm_eps, None)


def _launch(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    output: Tensor | None,
    post: Tensor | None,
    comb: Tensor | None,
    results: tuple[Fp8Rows, Tensor, Tensor] | None,  # quantised x, post and comb, to be written; None for the head
    sinkhorn_iters: int,
    hc_eps: float,
    norm_eps: float,
    tiles: Tiles | None,
) -> tuple[Tensor, Tensor]:
    """New streams and x."""
    num_tokens, num_streams, hidden = streams.shape
    if num_streams != STREAMS or not streams.is_contiguous():
        raise ValueError(f"mhc: streams are {list(streams.shape)}; the Triton kernels take contiguous [T, 4, D]")
    x = torch.empty(num_tokens, hidden, device=streams.device, dtype=streams.dtype)
    if not num_tokens:
        return (streams if output is None else torch.empty_like(streams)), x
    outs = (x,) * 5
    if results is not None:
        outs = results[0].codes, results[0].exponents, results[0].scales_to_write, *results[1:]
    sizes = {"ITERATIONS": sinkhorn_iters, "GROUPS": triton.next_power_of_2(triton.cdiv(hidden, GROUP))}
    takes_many = num_tokens >= MANY and streams.dtype is torch.bfloat16 and not is_deterministic()
    if tiles is None and takes_many:
        new_streams, partials, squares = mix_many(streams, fn, output, post, comb)
        sizes |= {"SLICES": triton.next_power_of_2(partials.shape[1]), "HAS_SQUARES": True}
    else:
        new_streams = streams if output is None else torch.empty_like(streams)
        tiles = tiles or tiles_for(num_tokens, hidden)
        num_tiles, num_slices = triton.cdiv(num_tokens, tiles.tokens), triton.cdiv(hidden, tiles.dims)
        partials = squares = torch.empty(num_tokens, num_slices, LANES, device=streams.device, dtype=torch.float32)
        sizes["SLICES"] = triton.next_power_of_2(num_slices)
        given = (
            streams,
            streams if output is None else output,
            streams if post is None else post,
            streams if comb is None else comb,
            fn,
            new_streams,
        )
        num_parts = 0 if output is None else output.numel() // (num_tokens * hidden)
        if tiles.tokens == 1:
            mix_one[(num_tiles, num_slices + (sinkhorn_iters > 0))](
                *given, *fn.stride(), counters(streams.device, 2 * num_tiles), partials, base, scale, norm, x, *outs,
                hidden, num_tokens, hc_eps, norm_eps, PARTS=num_parts, DIMS=tiles.dims, **sizes, num_warps=8,
                launch_pdl=launches_early(streams.device),
            )  # fmt: skip
            return new_streams, x
        num_warps, num_stages = WARPS_STAGES[tiles.tokens]
        _mix[(num_tiles, num_slices)](
            *given,
            num_tokens,
            *fn.stride(),
            partials,
            hidden,
            PARTS=num_parts,
            MIXES=24 if sinkhorn_iters else 4,
            TOKENS=tiles.tokens,
            DIMS=tiles.dims,
            BLOCK_D=BLOCK_D,
            num_warps=num_warps,
            num_stages=num_stages,
            maxnreg=255,  # left alone, the assembler spills to let more programs run side by side than there are
            launch_pdl=launches_early(streams.device),
        )
        sizes["HAS_SQUARES"] = False
    finish_tokens[(num_tokens,)](
        new_streams, partials, squares, base, scale, norm, x, *outs, hidden, partials.shape[1], num_tokens, hc_eps,
        norm_eps, **sizes, num_warps=8,
        launch_pdl=launches_early(streams.device),
    )  # fmt: skip
    return new_streams, x
