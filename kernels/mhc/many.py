"""The boundary's first half for many tokens: streams at the speed of memory, and the mix product by the library.

A token's new streams are one pass over its row. The mix weights are float32 and the streams bfloat16, so the product is
one of bfloat16 after the weights are taken apart into three terms, which hold their 24 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.gemm import library

TERMS = 3
LANES = 32  # 2c + c * c = 24 mixes and, in lane 24, the sum of squares if it is there; padded to a power of two


@triton.jit
def _take_apart(fn, terms, fn_row, fn_column, num_mixes, depth, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """Row `lane` of fn as TERMS rows of bfloat16, which add up to it; zeros beyond the mixes."""
    wait_for_previous()
    lane = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < depth
    rest = tl.load(fn + lane * fn_row + column.to(tl.int64) * fn_column, mask=inside & (lane < num_mixes), other=0.0)
    for n in tl.static_range(TERMS):
        term = rest.to(tl.bfloat16)
        tl.store(terms + (n * tl.num_programs(0) + lane).to(tl.int64) * depth + column, term, mask=inside)
        rest -= term.to(tl.float32)


@triton.jit
def _add_output(
    streams,  # bf16 [tokens, 4, hidden]
    output,  # bf16 [tokens, PARTS, hidden], with PARTS > 0
    post,  # f32 [tokens, 4]
    comb,  # f32 [tokens, 4, 4]
    new_streams,  # like streams, with PARTS > 0
    squares,  # f32 [tokens]
    hidden,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """New stream j: post_j * output + sum_i comb[i, j] * stream_i; and the sum of all their squares."""
    wait_for_previous()
    token = tl.program_id(0).to(tl.int64)
    streams += token * 4 * hidden
    new_streams += token * 4 * hidden
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, hidden, BLOCK):
        dim = first + tl.arange(0, BLOCK)
        inside = dim < hidden
        s0 = tl.load(streams + dim, mask=inside, other=0.0).to(tl.float32)
        s1 = tl.load(streams + hidden + dim, mask=inside, other=0.0).to(tl.float32)
        s2 = tl.load(streams + 2 * hidden + dim, mask=inside, other=0.0).to(tl.float32)
        s3 = tl.load(streams + 3 * hidden + dim, mask=inside, other=0.0).to(tl.float32)
        if PARTS > 0:
            added = tl.zeros([BLOCK], tl.float32)
            for n in tl.static_range(PARTS):
                added += tl.load(output + (token * PARTS + n) * hidden + dim, mask=inside, other=0.0).to(tl.float32)
            added = added.to(streams.dtype.element_ty).to(tl.float32)
            for j in tl.static_range(4):
                at = comb + token * 16 + j
                value = tl.load(post + token * 4 + j) * added + tl.load(at) * s0 + tl.load(at + 4) * s1
                value = value + tl.load(at + 8) * s2 + tl.load(at + 12) * s3
                value = value.to(streams.dtype.element_ty)
                tl.store(new_streams + j * hidden + dim, value, mask=inside)
                value = value.to(tl.float32)
                total += value * value
        else:
            total += s0 * s0 + s1 * s1 + s2 * s2 + s3 * s3
    tl.store(squares + token, tl.sum(total, axis=0))


def mix_many(
    streams: Tensor, fn: Tensor, output: Tensor | None, post: Tensor | None, comb: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """New streams bf16 [T, 4, D], mix products f32 [T, TERMS, 32] to be added up, and sums of squares f32 [T].

    Arguments as those of `mhc_boundary`, streams bfloat16.
    """
    num_tokens, _, hidden = streams.shape
    new_streams = streams if output is None else torch.empty_like(streams)
    squares = torch.empty(num_tokens, device=streams.device, dtype=torch.float32)
    _add_output[(num_tokens,)](
        streams,
        streams if output is None else output,
        squares if post is None else post,
        squares if comb is None else comb,
        new_streams,
        squares,
        hidden,
        PARTS=0 if output is None else output.numel() // (num_tokens * hidden),
        BLOCK=1024,
        num_warps=4,
        launch_pdl=launches_early(streams.device),
    )
    terms = torch.empty(TERMS * LANES, 4 * hidden, device=streams.device, dtype=torch.bfloat16)
    _take_apart[(LANES, triton.cdiv(4 * hidden, 2048))](
        fn,
        terms,
        *fn.stride(),
        fn.shape[0],
        4 * hidden,
        TERMS=TERMS,
        BLOCK=2048,
        num_warps=8,
        launch_pdl=launches_early(streams.device),
    )
    products = library.linear_bf16(new_streams.view(num_tokens, 4 * hidden), terms)
    return new_streams, products.view(num_tokens, TERMS, LANES), squares
