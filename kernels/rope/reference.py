"""Rotary embedding in plain torch: interleaved pairs on the trailing dims, YaRN (docs/model.md section 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rope_frequencies(dim: int, theta: float, yarn: tuple[float, int, float, float] | None) -> Tensor:
    """Angle per position of each pair, float64 [dim // 2] on the CPU.

    Args:
        dim: rotated dims.
        yarn: (factor, original_max_position_embeddings, beta_fast, beta_slow) or None. Applied at every length, without
            an attention factor.
    """
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    if yarn is None:
        return frequencies
    factor, original, beta_fast, beta_slow = yarn

    def correction(beta: float) -> float:
        return dim * math.log(original / (2 * math.pi * beta)) / (2 * math.log(theta))

    low = max(math.floor(correction(beta_fast)), 0)
    high = min(math.ceil(correction(beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / width).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp)


def rope_table(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Rotations e^(i * position * frequency), complex64 [T, dim // 2], at int32 or int64 positions [T].

    Angles are float32 products of float32 factors, as in the official code. Can be captured in a CUDA graph when the
    frequencies are on the device of the positions.
    """
    angles = positions.float().unsqueeze(1) * frequencies.to(positions.device, torch.float32)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope(x: Tensor, rotations: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last dims of x [T, .., d] by the row's angles (the negative ones when `inverse`).

    Pairs (2i, 2i + 1) of the trailing 2 * rotations.shape[-1] dims are complex numbers; leading dims pass through.
    Float32 inside, result in x.dtype.
    """
    half = rotations.shape[-1]
    if inverse:
        rotations = rotations.conj()
    if x.dim() > 2:
        rotations = rotations.view(rotations.shape[0], *(1,) * (x.dim() - 2), half)
    first = x.shape[-1] - 2 * half
    if x.requires_grad:
        return torch.cat([x[..., :first], _rotate(x[..., first:], rotations.real, rotations.imag)], dim=-1)
    rotated = x.to(torch.float32, copy=True)  # rotated in place: half the calls of taking it apart and together
    pairs = torch.view_as_complex(rotated[..., first:].unflatten(-1, (half, 2)))
    pairs.mul_(rotations)
    return rotated.to(x.dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The same in real arithmetic, whose gradient a compiler can fuse: x [.., 2 * half]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
