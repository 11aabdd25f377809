"""Queries in registers: the device function that the Triton kernels of several operations share."""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.rope.device import rotate


@triton.jit
def prepare_heads(
    q,  # bf16 [rows, num_heads, DIM], stride q_row; heads are neighbours
    rotations,  # f32 [rows, ROPE / 2, 2]
    positions,
    out,  # like q, stride out_row; may be q
    row,  # int64
    first_head,
    num_heads,
    q_row,
    out_row,
    eps,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """RMS and RoPE of HEADS heads of one row, as `prepare_q` does; nothing for a padding row."""
    inside = tl.load(positions + row) >= 0
    head = first_head + tl.arange(0, HEADS)[:, None]
    keep = inside & (head < num_heads)
    dim, tail = tl.arange(0, DIM)[None, :], DIM - ROPE + tl.arange(0, ROPE)[None, :]
    x = tl.load(q + row * q_row + head * DIM + dim, mask=keep, other=0.0).to(tl.float32)
    x_tail = tl.load(q + row * q_row + head * DIM + tail, mask=keep, other=0.0).to(tl.float32)
    # As the official code, in bf16: the square, the mean, its sum with eps and the root are all rounded.
    squares = (x * x).to(tl.bfloat16).to(tl.float32)
    mean = (tl.sum(squares, axis=1) / DIM).to(tl.bfloat16).to(tl.float32)
    mean = (mean + eps).to(tl.bfloat16).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean)).to(tl.bfloat16).to(tl.float32)[:, None]
    tl.store(out + row * out_row + head * DIM + dim, (x * inverse).to(tl.bfloat16), mask=keep & (dim < DIM - ROPE))
    turned = rotate((x_tail * inverse).to(tl.bfloat16), rotations + row * ROPE, ROPE)
    tl.store(out + row * out_row + head * DIM + tail, turned, mask=keep)
