"""Rotary embedding in C: float32."""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels import cpu


def apply_rope(x: Tensor, rotations: Tensor, inverse: bool = False) -> Tensor | None:
    """See reference.py. x [T, d] or [T, heads, d], of which the inner dims are dense."""
    if x.dim() not in (2, 3) or not cpu.fits(x) or not rotations.is_contiguous():
        return None
    num_tokens, length = x.shape[0], x.shape[-1]
    num_heads = x.shape[1] if x.dim() == 3 else 1
    if x.stride(-1) != 1 or (x.dim() == 3 and x.stride(1) != length):
        return None
    out = x.new_empty(x.shape)
    cpu.library.dsv4_apply_rope(
        x.data_ptr(),
        x.stride(0),
        rotations.data_ptr(),
        out.data_ptr(),
        num_tokens,
        num_heads,
        length,
        rotations.shape[1],
        inverse,
    )
    return out
