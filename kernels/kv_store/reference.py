"""Row formats in plain torch: what one cached vector looks like in bytes, and back.

A format stores rows as planes, tensors that share the row index: planes keep every row's data aligned (576 B at
head_dim 512, so a TMA can fetch it) without the per-page padding of a block-split page.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from dsv4_kernels.quant import dequantize_fp4, dequantize_fp8, quantize_fp4, quantize_fp8

KV_GROUP = 64  # values that share a scale in a main row
FP4_GROUP = 32
SCALE_ALIGN = 8  # scale bytes of a main row are padded to this


class Format(StrEnum):
    """Encodings of a row. F32 serves the `exact` numerics, the others are bit-equal to the official rounding."""

    F32 = "f32"
    KV_FP8 = "kv_fp8"  # nope e4m3 + rope bf16 | ue8m0 per 64 nope values
    INDEX_FP4 = "index_fp4"  # e2m1, low nibble first | ue8m0 per 32
    INDEX_FP8 = "index_fp8"  # e4m3 | one float32 scale per row (amax / 448, not a power of two)


@dataclass(frozen=True)
class RowFormat:
    """One row of `dim` values, the last `rope_dim` of them rotated."""

    format: Format
    dim: int
    rope_dim: int = 0

    @property
    def plane_bytes(self) -> tuple[int, ...]:
        """Bytes of one row in each plane."""
        nope = self.dim - self.rope_dim
        match self.format:
            case Format.F32:
                return (4 * self.dim,)
            case Format.KV_FP8:
                return (nope + 2 * self.rope_dim, -(-(nope // KV_GROUP) // SCALE_ALIGN) * SCALE_ALIGN)
            case Format.INDEX_FP4:
                return (self.dim // 2, self.dim // FP4_GROUP)
            case Format.INDEX_FP8:
                return (self.dim, 4)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all planes."""
        return sum(self.plane_bytes)


Planes = tuple[Tensor, ...]  # uint8 [rows, plane_bytes[i]]


def encode(values: Tensor, row_format: RowFormat) -> Planes:
    """Values [..., dim] to planes of uint8 [..., plane_bytes]. F32 keeps all bits."""
    nope = row_format.dim - row_format.rope_dim
    match row_format.format:
        case Format.F32:
            return (values.float().contiguous().view(torch.uint8),)
        case Format.KV_FP8:
            data, scale = quantize_fp8(values[..., :nope].contiguous(), KV_GROUP)
            rope = values[..., nope:].to(torch.bfloat16).contiguous()
            padding = row_format.plane_bytes[1] - scale.shape[-1]
            return (
                torch.cat([data.view(torch.uint8), rope.view(torch.uint8)], dim=-1),
                torch.nn.functional.pad(scale, (0, padding)),
            )
        case Format.INDEX_FP4:
            return quantize_fp4(values, FP4_GROUP)
        case Format.INDEX_FP8:
            scale = values.float().abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448.0
            data = (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            return data.view(torch.uint8), scale.view(-1).view(torch.uint8).view(*scale.shape[:-1], 4)


def decode(planes: Planes, row_format: RowFormat) -> Tensor:
    """Planes back to values [..., dim]: float32 for F32, else bfloat16 (exact for KV_FP8 and INDEX_FP4)."""
    nope = row_format.dim - row_format.rope_dim
    match row_format.format:
        case Format.F32:
            return planes[0].view(torch.float32)
        case Format.KV_FP8:
            data, scale = planes
            num_groups = nope // KV_GROUP
            low = dequantize_fp8(data[..., :nope].view(torch.float8_e4m3fn), scale[..., :num_groups], KV_GROUP)
            return torch.cat([low.to(torch.bfloat16), data[..., nope:].view(torch.bfloat16)], dim=-1)
        case Format.INDEX_FP4:
            return dequantize_fp4(planes[0], planes[1], FP4_GROUP).to(torch.bfloat16)
        case Format.INDEX_FP8:
            return (planes[0].view(torch.float8_e4m3fn).float() * planes[1].view(torch.float32)).to(torch.bfloat16)


def store(planes: Planes, rows: Tensor, encoded: Planes) -> None:
    """Write encoded rows [n] to row numbers `rows` int64 [n] of the cache planes. Rows are distinct."""
    for plane, new in zip(planes, encoded, strict=True):
        plane[rows] = new


def load(planes: Planes, rows: Tensor, row_format: RowFormat) -> Tensor:
    """Values [*rows.shape, dim] of row numbers `rows`; -1 reads the last row, which a pool keeps zero."""
    return decode(tuple(take_rows(plane, rows) for plane in planes), row_format)


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Rows of values [n, ..] by number: int64 [*shape] -> [*shape, ..]; -1 is the last row.

    index_select copies whole rows, much faster than indexing; it takes no -1, which the modulo turns into the last row.
    """
    return values.index_select(0, (rows % values.shape[0]).flatten()).unflatten(0, rows.shape)
