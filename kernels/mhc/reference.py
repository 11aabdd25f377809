"""Manifold-constrained hyper-connections in plain torch (docs/model.md section 3). c = number of streams."""

from __future__ import annotations

import torch
from torch import Tensor


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Doubly-stochastic mixing matrices float32 [T, c, c] from logits of the same shape.

    Row softmax, + eps, divide by (column sum + eps); then iters - 1 times rows, columns. The result is always
    diag(r) K diag(k) with K the first matrix, so only the reciprocals 1/r and 1/k are iterated:
    column step: k <- k / (k * (K^T r) + eps), hence 1/k <- K^T r + eps * (1/k); rows alike.
    """
    kernel = torch.softmax(logits, dim=-1) + eps
    transposed = kernel.transpose(1, 2)
    row_inv = torch.ones_like(logits[:, :, :1])
    column_inv = kernel.sum(dim=1).unsqueeze(2) + eps
    if logits.requires_grad:  # elementwise, so that a compiler can fuse the loop and its gradient
        for _ in range(iters - 1):
            row_inv = (kernel / column_inv.transpose(1, 2)).sum(-1, keepdim=True) + eps * row_inv
            column_inv = (transposed / row_inv.transpose(1, 2)).sum(-1, keepdim=True) + eps * column_inv
        return kernel / (row_inv * column_inv.transpose(1, 2))
    spare = torch.empty_like(row_inv)  # buffers are reused: a third of the loop's time would be allocation
    for _ in range(iters - 1):
        torch.reciprocal(column_inv, out=spare)
        torch.baddbmm(row_inv, kernel, spare, beta=eps, out=row_inv)
        torch.reciprocal(row_inv, out=spare)
        torch.baddbmm(column_inv, transposed, spare, beta=eps, out=column_inv)
    return kernel / (row_inv * column_inv.transpose(1, 2))


def _mixes(streams: Tensor, fn: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """Streams as float32 [T, c, D], and their mix logits [T, fn rows] normalised over all c * D values jointly."""
    values = streams.float()
    flat = values.flatten(1)
    inverse_rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return values, torch.nn.functional.linear(flat, fn) * inverse_rms


def mhc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, sinkhorn_iters: int, hc_eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the streams into a sublayer's input, and compute how its output returns.

    Args:
        streams: [T, c, D]; fn float32 [2c + c*c, c*D]; base and scale float32 [2c + c*c], in the
            order pre, post, comb (the checkpoint has one scale for each of the three).

    Returns:
        Input [T, D] in streams.dtype, post float32 [T, c], comb float32 [T, c, c].
    """
    num_streams = streams.shape[1]
    values, mixes = _mixes(streams, fn, norm_eps)
    mixes = torch.addcmul(base, mixes, scale)
    gates = torch.sigmoid(mixes[:, : 2 * num_streams])
    pre, post = gates[:, :num_streams] + hc_eps, 2.0 * gates[:, num_streams:]
    comb = mixes[:, 2 * num_streams :].unflatten(-1, (num_streams, num_streams))
    merged = (pre.unsqueeze(2) * values).sum(dim=1).to(streams.dtype)
    return merged, post, sinkhorn(comb, sinkhorn_iters, hc_eps)


def mhc_post(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """New streams [T, c, D]: post_j * output + sum_i comb[i, j] * streams_i, float32 inside, rounded once."""
    result = post.unsqueeze(2) * output.float().unsqueeze(1)
    for stream, weights in zip(streams.float().unbind(1), comb.unbind(1), strict=True):
        result = torch.addcmul(result, weights.unsqueeze(2), stream.unsqueeze(1))
    return result.to(streams.dtype)


def mhc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, hc_eps: float, norm_eps: float) -> Tensor:
    """Final collapse [T, c, D] -> [T, D]: sigmoid weights, no Sinkhorn. fn float32 [c, c*D], base [c], scale [1]."""
    values, mixes = _mixes(streams, fn, norm_eps)
    pre = torch.sigmoid(torch.addcmul(base, mixes, scale)) + hc_eps
    return (pre.unsqueeze(2) * values).sum(dim=1).to(streams.dtype)
