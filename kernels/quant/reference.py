"""Quantisation rules in plain torch (docs/model.md section 9), bit-equal to the official code.

All scales are powers of two, rounded up: s = 2^ceil(log2(amax / qmax)), taken from the float32 bits. Values are
rounded to nearest, ties to even. FP4 codes sit two in a byte, the even element in the low nibble.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

FP8_MAX = 448.0
FP8_AMAX_FLOOR = 1e-4  # of activations
FP8_WEIGHT_FLOOR = 448.0 * 2.0**-126  # of weight blocks: only keeps the scale of an all-zero block normal
FP4_MAX = 6.0
FP4_AMAX_FLOOR = 6.0 * 2.0**-126
BLOCK = 128  # side of a weight block that shares one scale
MANTISSA = 0x7FFFFF

_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _power_of_two_ceil(values: Tensor) -> Tensor:
    """Smallest power of two >= each positive normal float32 value."""
    return ((values.view(torch.int32) + MANTISSA) & ~MANTISSA).view(torch.float32)


def _scale_byte(scale: Tensor) -> Tensor:
    """E8M0 byte (exponent + 127) of float32 powers of two."""
    return (scale.view(torch.int32) >> 23).to(torch.uint8)


def _scale_value(byte: Tensor) -> Tensor:
    """float32 value of E8M0 bytes (uint8 or float8_e8m0fnu). Byte 0 is 2^-127, a subnormal; 255 is NaN."""
    return byte.view(torch.float8_e8m0fnu).float()


def _scaled_groups(x: Tensor, group: int, floor: float, largest: float) -> tuple[Tensor, Tensor]:
    """x f32 [.., K/group, group] divided by its scale, and the scale f32 [.., K/group, 1].

    |x / scale| is at most `largest` up to one rounding of amax / largest, which is far below half a step of either
    format: no clamp is needed before the rounding.
    """
    if x.shape[-1] % group:
        raise ValueError(f"quantize: the last dim is {x.shape[-1]}; expected a multiple of the group, {group}")
    groups = x.float().unflatten(-1, (-1, group))
    amax = groups.abs().amax(dim=-1, keepdim=True).clamp_min(floor)
    scale = _power_of_two_ceil(amax * (1.0 / largest))
    return groups / scale, scale


def quantize_fp8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x [.., K] -> (e4m3 [.., K], E8M0 bytes uint8 [.., K // group]). K is a multiple of `group`."""
    scaled, scale = _scaled_groups(x, group, FP8_AMAX_FLOOR, FP8_MAX)
    codes = scaled.to(torch.float8_e4m3fn).flatten(-2)
    return codes, _scale_byte(scale.squeeze(-1))


def dequantize_fp8(codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """Inverse of `quantize_fp8`, float32 [.., K]."""
    return (codes.float().unflatten(-1, (-1, group)) * _scale_value(scale).unsqueeze(-1)).flatten(-2)


class _StraightThrough(torch.autograd.Function):
    """Rounding with the gradient of the identity, as quantisation-aware training needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: int, rounding: Callable[[Tensor, int], Tensor]) -> Tensor:
        return rounding(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def _round_fp8(x: Tensor, group: int) -> Tensor:
    scaled, scale = _scaled_groups(x, group, FP8_AMAX_FLOOR, FP8_MAX)
    return (scaled.to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)


def fake_quantize_fp8(x: Tensor, group: int) -> Tensor:
    """x rounded to what FP8 with group scales can hold, in x.dtype (exact in bfloat16 and float32).

    Equal to `dequantize_fp8(*quantize_fp8(x, group), group)`. The gradient passes through unchanged.
    """
    return _StraightThrough.apply(x, group, _round_fp8) if x.requires_grad else _round_fp8(x, group)


def _fp4_midpoints() -> list[float]:
    """Midpoints between FP4 magnitudes, arranged so that `count of midpoints < |x|` rounds ties to the even code."""
    middles = [np.float32((low + high) / 2) for low, high in pairwise(_FP4_VALUES)]
    # Where the upper neighbour has an even code, the middle itself must round up.
    return [float(np.nextafter(middle, np.float32(0)) if i % 2 else middle) for i, middle in enumerate(middles)]


@lru_cache
def _fp4_thresholds(device: torch.device) -> Tensor:
    return torch.tensor(_fp4_midpoints(), device=device)


@lru_cache
def _fp4_table(device: torch.device) -> Tensor:
    return torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)], device=device)


def _fp4_codes(scaled: Tensor) -> Tensor:
    """FP4 codes int64 of scaled values; saturates at 6."""
    return torch.bucketize(scaled.abs(), _fp4_thresholds(scaled.device)) + 8 * torch.signbit(scaled)


def quantize_fp4(x: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """x [.., K] -> (two E2M1 codes a byte, uint8 [.., K // 2]; E8M0 bytes uint8 [.., K // group])."""
    scaled, scale = _scaled_groups(x, group, FP4_AMAX_FLOOR, FP4_MAX)
    codes = _fp4_codes(scaled).to(torch.uint8).flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), _scale_byte(scale.squeeze(-1))


def unpack_fp4(packed: Tensor) -> Tensor:
    """Two codes a byte (uint8 or int8 [.., K // 2]) -> float32 values without scale [.., K]."""
    codes = packed.view(torch.uint8)
    both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return _fp4_table(packed.device)[both.to(torch.int32)]


def dequantize_fp4(packed: Tensor, scale: Tensor, group: int = 32) -> Tensor:
    """Inverse of `quantize_fp4`, float32 [.., K]."""
    return (unpack_fp4(packed).unflatten(-1, (-1, group)) * _scale_value(scale).unsqueeze(-1)).flatten(-2)


def _round_fp4(x: Tensor, group: int) -> Tensor:
    scaled, scale = _scaled_groups(x, group, FP4_AMAX_FLOOR, FP4_MAX)
    return (_fp4_table(x.device)[_fp4_codes(scaled)] * scale).flatten(-2).to(x.dtype)


def fake_quantize_fp4(x: Tensor, group: int = 32) -> Tensor:
    """x rounded to what FP4 with group scales can hold, in x.dtype. The gradient passes through unchanged."""
    return _StraightThrough.apply(x, group, _round_fp4) if x.requires_grad else _round_fp4(x, group)


def _expand_blocks(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales [ceil(rows / 128), ceil(columns / 128)] -> float32 [rows, columns]."""
    expanded = _scale_value(scale).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return expanded[:rows, :columns]


def dequantize_fp8_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """e4m3 weight [N, K] with one E8M0 scale per 128x128 block -> float32 [N, K]."""
    return weight.float() * _expand_blocks(scale, *weight.shape)


def quantize_fp8_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 weight [N, K] -> (e4m3 [N, K], E8M0 bytes uint8 [ceil(N / 128), ceil(K / 128)])."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    amax = padded.abs().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).amax(dim=(1, 3))
    scale = _power_of_two_ceil(amax.clamp_min(FP8_WEIGHT_FLOOR) * (1.0 / FP8_MAX))
    byte = _scale_byte(scale)
    return (weight.float() / _expand_blocks(byte, rows, columns)).to(torch.float8_e4m3fn), byte


def dequantize_fp4_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Packed FP4 weight int8 [.., N, K // 2] with E8M0 per 32 of K -> float32 [.., N, K]."""
    return dequantize_fp4(weight, scale)


def quantize_fp4_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 weight [.., N, K] -> (packed int8 [.., N, K // 2], E8M0 bytes uint8 [.., N, K // 32])."""
    packed, scale = quantize_fp4(weight)
    return packed.view(torch.int8), scale


@lru_cache
def _hadamard_matrix(dim: int, device: torch.device) -> Tensor:
    if dim & (dim - 1):
        raise ValueError(f"hadamard: the last dim is {dim}; expected a power of two")
    with torch.inference_mode(False):  # cached: a first call without gradients must not break a later one with them
        matrix = torch.ones(1, 1, device=device)
        while matrix.shape[0] < dim:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform over the last dim (a power of two), Sylvester order, times d^-0.5: float32 [.., d]."""
    return (x.float() @ _hadamard_matrix(x.shape[-1], x.device)) * x.shape[-1] ** -0.5
