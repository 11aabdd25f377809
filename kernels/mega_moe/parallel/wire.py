"""A token on its way to a rank that has experts of it: quantised before it travels, one row of bytes.

| bytes | what |
|---|---|
| D for fp8, D / 2 for fp4, 2 D for bf16 (4 D for float32) | values: E4M3 or two E2M1 a byte |
| 4 K | int32 slots of the token's experts on this rank, -1 for those elsewhere |
| 4 K | float32 routing weights |
| D / 128 for fp8, D / 32 for fp4 | E8M0 scales |

filled up to a multiple of 16. Pro with fp8: 7,296 bytes, with fp4 3,856, with bf16 14,384.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.mega_moe.reference import ACTIVATION_GROUP, Activations
from dsv4_kernels.quant import reference

ALIGNMENT = 16
FP4_GROUP = 32


@dataclass(frozen=True)
class RowFormat:
    """Where things are in a row."""

    hidden_size: int
    top_k: int
    activations: Activations
    dtype: torch.dtype = torch.bfloat16  # of the tokens

    @property
    def value_bytes(self) -> int:
        """Of the values."""
        per_byte = {"bf16": 1 / self.dtype.itemsize, "fp8": 1, "fp4": 2}[self.activations]
        return int(self.hidden_size / per_byte)

    @property
    def scale_bytes(self) -> int:
        """Of the scales."""
        return {"bf16": 0, "fp8": self.hidden_size // ACTIVATION_GROUP, "fp4": self.hidden_size // FP4_GROUP}[
            self.activations
        ]

    @property
    def row_bytes(self) -> int:
        """Of all."""
        return -(-(self.value_bytes + 8 * self.top_k + self.scale_bytes) // ALIGNMENT) * ALIGNMENT

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> bytes of the values [T, value_bytes] and of the scales [T, scale_bytes], uint8."""
        if self.activations == "bf16":
            return x.contiguous().view(torch.uint8), x.new_empty(len(x), 0, dtype=torch.uint8)
        quant = reference
        if x.is_cuda:
            from dsv4_kernels.quant import triton as quant  # no CPU needs Triton
        fp8 = self.activations == "fp8"
        codes, scales = quant.quantize_fp8(x, ACTIVATION_GROUP) if fp8 else quant.quantize_fp4(x)
        return codes.view(torch.uint8), scales

    def pack(self, values: Tensor, scales: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """Rows uint8 [R, row_bytes]: bytes as `quantize` gives them, slots [R, K], weights float32 [R, K]."""
        parts = [values, slots.int().contiguous().view(torch.uint8), weights.contiguous().view(torch.uint8), scales]
        padding = self.row_bytes - sum(part.shape[1] for part in parts)
        return torch.cat([*parts, values.new_zeros(len(values), padding)], dim=1)

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inverse of `pack`; slots are int32."""
        sizes = [self.value_bytes, 4 * self.top_k, 4 * self.top_k, self.scale_bytes]
        values, slots, weights, scales = (part.contiguous() for part in rows[:, : sum(sizes)].split(sizes, dim=1))
        return values, scales, slots.view(torch.int32), weights.view(torch.float32)

    def dequantize(self, values: Tensor, scales: Tensor) -> Tensor:
        """Inverse of `quantize`, exact: [R, D] in the tokens' dtype."""
        if self.activations == "bf16":
            return values.view(self.dtype)
        if self.activations == "fp8":
            return reference.dequantize_fp8(values.view(torch.float8_e4m3fn), scales, ACTIVATION_GROUP).to(self.dtype)
        return reference.dequantize_fp4(values, scales).to(self.dtype)
