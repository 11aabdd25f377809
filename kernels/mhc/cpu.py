"""Hyper-connections in C: float32, at most four streams, `fn` column by column."""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels import cpu


def mhc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, sinkhorn_iters: int, hc_eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """See reference.py."""
    if streams.shape[1] > cpu.STREAMS or not cpu.fits(streams, fn, base, scale) or not cpu.by_column(fn):
        return None
    streams = streams.contiguous()  # the embedding is one row seen as many streams
    num_tokens, num_streams, hidden_size = streams.shape
    merged = streams.new_empty(num_tokens, hidden_size)
    post = streams.new_empty(num_tokens, num_streams)
    comb = streams.new_empty(num_tokens, num_streams, num_streams)
    cpu.library.dsv4_mhc_pre(
        streams.data_ptr(),
        fn.data_ptr(),
        base.data_ptr(),
        scale.data_ptr(),
        merged.data_ptr(),
        post.data_ptr(),
        comb.data_ptr(),
        num_tokens,
        num_streams,
        hidden_size,
        sinkhorn_iters,
        hc_eps,
        norm_eps,
    )
    return merged, post, comb


def mhc_post(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor | None:
    """See reference.py."""
    if not cpu.fits(output, streams, post, comb) or not (
        output.is_contiguous() and post.is_contiguous() and comb.is_contiguous()
    ):
        return None
    streams = streams.contiguous()
    out = streams.new_empty(streams.shape)
    cpu.library.dsv4_mhc_post(
        output.data_ptr(), streams.data_ptr(), post.data_ptr(), comb.data_ptr(), out.data_ptr(), *streams.shape
    )
    return out


def mhc_head(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, hc_eps: float, norm_eps: float
) -> Tensor | None:
    """See reference.py."""
    if streams.shape[1] > cpu.STREAMS or not cpu.fits(streams, fn, base, scale) or not cpu.by_column(fn):
        return None
    streams = streams.contiguous()
    merged = streams.new_empty(streams.shape[0], streams.shape[2])
    cpu.library.dsv4_mhc_head(
        streams.data_ptr(),
        fn.data_ptr(),
        base.data_ptr(),
        scale.data_ptr(),
        merged.data_ptr(),
        *streams.shape,
        hc_eps,
        norm_eps,
    )
    return merged
