"""Window rows and queries in registers: the device functions that the Triton kernels of several operations share."""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.quant.device import inverse_power_of_two, scale_exponent
from dsv4_kernels.rope.device import rotate


@triton.jit
def store_row(
    row,  # int64
    kv,  # bf16 [rows, DIM], stride kv_row
    weight,  # f32 [DIM]
    rotations,  # f32 [rows, 32, 2]
    slots,
    positions,
    counts,
    step_codes,  # the data plane as e4m3 [rows, data_bytes] and as bf16 [rows, data_bytes / 2]
    step_rope,
    step_scale,  # uint8 [rows, GROUPS]
    ring_codes,
    ring_rope,
    ring_scale,
    kv_row,
    ring_rows,
    room,
    eps,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Norm, rotate, quantise and store one window row, as `store_kv` does; nothing for a padding row."""
    position = tl.load(positions + row)
    inside = position >= 0
    NOPE: tl.constexpr = DIM - GROUP
    DATA: tl.constexpr = NOPE + 2 * GROUP
    group, lane = tl.arange(0, GROUPS), tl.arange(0, GROUP)
    dim = group[:, None] * GROUP + lane[None, :]
    x = tl.load(kv + row * kv_row + dim, mask=inside & (dim < DIM), other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x) / DIM + eps))
    normed = x * inverse * tl.load(weight + dim, mask=dim < DIM, other=0.0)
    normed = normed.to(tl.bfloat16).to(tl.float32)
    exponent = scale_exponent(normed, 1, FP4=False)
    codes = (normed * inverse_power_of_two(exponent)[:, None]).to(tl.float8e4nv)
    scale = tl.where(group < NOPE // GROUP, exponent, 0).to(tl.uint8)

    x = tl.load(kv + row * kv_row + NOPE + lane, mask=inside, other=0.0).to(tl.float32)
    tail = (x * inverse * tl.load(weight + NOPE + lane)).to(tl.bfloat16)
    tail = rotate(tail[None, :], rotations + row * GROUP, GROUP)
    tail_at = NOPE // 2 + lane[None, :]

    keep = inside & (dim < NOPE)
    tl.store(step_codes + row * DATA + dim, codes, mask=keep)
    tl.store(step_rope + row * (DATA // 2) + tail_at, tail, mask=inside)
    tl.store(step_scale + row * GROUPS + group, scale, mask=inside)
    fits = inside & (tl.load(counts + row) <= room)
    target = tl.load(slots + row).to(tl.int64) * ring_rows + position % ring_rows
    tl.store(ring_codes + target * DATA + dim, codes, mask=keep & fits)
    tl.store(ring_rope + target * (DATA // 2) + tail_at, tail, mask=fits)
    tl.store(ring_scale + target * GROUPS + group, scale, mask=fits)


@triton.jit
def prepare_heads(
    q,  # pointers [n, 1] to bf16 heads of DIM
    rotations,  # pointers to the f32 angles of their rows, [n, 1] or one
    out,  # pointers [n, 1]; may be q
    keep,  # [n, 1]: what there is to do
    eps,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """RMS and RoPE of n heads, as `prepare_q` does."""
    dim, tail = tl.arange(0, DIM)[None, :], DIM - ROPE + tl.arange(0, ROPE)[None, :]
    x = tl.load(q + dim, mask=keep, other=0.0).to(tl.float32)
    x_tail = tl.load(q + tail, mask=keep, other=0.0).to(tl.float32)
    # As the official code, in bf16: the square, the mean, its sum with eps and the root are all rounded.
    squares = (x * x).to(tl.bfloat16).to(tl.float32)
    mean = (tl.sum(squares, axis=1) / DIM).to(tl.bfloat16).to(tl.float32)
    mean = (mean + eps).to(tl.bfloat16).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean)).to(tl.bfloat16).to(tl.float32)[:, None]
    tl.store(out + dim, (x * inverse).to(tl.bfloat16), mask=keep & (dim < DIM - ROPE))
    turned = rotate((x_tail * inverse).to(tl.bfloat16), rotations, ROPE)
    tl.store(out + tail, turned, mask=keep)


@triton.jit
def prepare_row_heads(
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
    """`prepare_heads` of HEADS heads of one row; nothing for a padding row."""
    inside = tl.load(positions + row) >= 0
    head = first_head + tl.arange(0, HEADS)[:, None]
    keep = inside & (head < num_heads)
    prepare_heads(
        q + row * q_row + head * DIM, rotations + row * ROPE, out + row * out_row + head * DIM, keep, eps, DIM, ROPE
    )
