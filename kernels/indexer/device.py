"""Index queries in registers: the device function of the kernel that prepares all queries of a row."""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.quant.device import e2m1_codes, e2m1_values, hadamard, power_of_two, scaled_groups
from dsv4_kernels.rope.device import interleave, rotate_pairs, split_pairs


@triton.jit
def prepare_index_vectors(
    q,  # bf16 [tokens, HEADS, DIM], rows q_stride apart
    weights,  # [tokens, HEADS], rows weights_stride apart
    positions,
    rotations,  # f32 [tokens, ROPE]
    new_q,  # bf16 [tokens, HEADS, DIM]
    new_weights,  # bf16 [tokens, HEADS]
    vector,  # int64 [16 or more], numbers of vectors: token * HEADS + head
    num_vectors,
    q_stride,
    weights_stride,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """RoPE, Hadamard and FP4 rounding of index queries; weights times `scale`. Nothing for padding rows."""
    inside = vector < num_vectors
    token, head = vector // HEADS, vector % HEADS
    keep = inside & (tl.load(positions + token, mask=inside, other=-1) >= 0)
    dim = tl.arange(0, DIM)[None, :]
    x = tl.load(q + (token * q_stride + head * DIM)[:, None] + dim, mask=keep[:, None], other=0.0).to(tl.float32)
    even, odd = split_pairs(x)
    even, odd = rotate_pairs(even, odd, (rotations + token * ROPE)[:, None], keep[:, None], DIM // 2, ROPE // 2)
    # Rounded after the reshape: Triton 3.6 cannot feed a reshaped tensor to GB300's tensor cores as it is.
    turned = hadamard(interleave(even, odd).to(tl.bfloat16), DIM)
    scaled, exponents = scaled_groups(turned.to(tl.float32), 32, FP4=True)
    rounded = e2m1_values(e2m1_codes(scaled)) * power_of_two(exponents)[:, :, None]
    rounded = tl.reshape(rounded.to(tl.bfloat16), [vector.shape[0], DIM])
    tl.store(new_q + (vector * DIM)[:, None] + dim, rounded, mask=keep[:, None])
    weight = tl.load(weights + token * weights_stride + head, mask=keep, other=0.0).to(tl.bfloat16).to(tl.float32)
    tl.store(new_weights + vector, (weight * scale).to(tl.bfloat16), mask=keep)
