"""The FP4 weights of all experts of a layer, laid out once at load for the Triton kernels.

Scales: those of 128 neighbouring inputs lie together for all rows, [E, K / 128, rows, 4], so that a tile's are one
piece of memory. In the checkpoint [E, rows, K / 32] a tile would read four bytes from each of its rows.

Values stay as in the checkpoint where tensor cores take FP4 (sm_100 and later). Elsewhere they must become bf16 in
registers, and unpacking limits the speed, so the bits are moved, in place, to where this costs least. The 32-bit word
(b, c) of a row holds the weights k = 32 b + 8 h + 2 c + e, h in 0..3 and e in 0..1: those a thread needs for four
steps of the bf16 instruction, whose registers hold the neighbours e = 0, 1. Half e of the word has, for each h, the
four bits of a code (sign, two of exponent, mantissa) where a mask after a shift by 3 h makes a bf16 number of them:

    bit    15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
    h       0  3  3  1  3  3  2  0  0  0  1  1  1  2  2  2

The sign of h = 0 is bit 15, its exponent 8 and 7, its mantissa 6; h = 1, 2 alike, lower by 3 and 6. h = 3 has what is
left: sign 14, mantissa 13, exponent 11 and 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_BLOCK = 128
# For each h, which bits of a code (mask) move how far to the left in half 0 of the word.
MOVES = (((7, 6), (8, 12)), ((7, 3), (8, 9)), ((7, 0), (8, 6)), ((1, 13), (6, 9), (8, 11)))


@dataclass(frozen=True)
class Fp4Weight:
    """FP4 weights [E, rows, K] in the form that the kernels read; made by `relayout`."""

    values: Tensor  # uint8 [E, rows, K / 2], the checkpoint's codes; unpacked: int32 [E, rows, K / 8]
    scales: Tensor  # E8M0 bytes uint8 [E, K / 128, rows, 4]
    unpacked: bool  # for tensor cores that have no FP4: the kernels make bf16 of it

    @property
    def num_experts(self) -> int:
        """E."""
        return self.values.shape[0]

    @property
    def num_rows(self) -> int:
        """Outputs of each expert."""
        return self.values.shape[1]

    @property
    def depth(self) -> int:
        """Inputs of each expert, K."""
        return self.scales.shape[1] * SCALE_BLOCK


def relayout(packed: Tensor, scale: Tensor, *, unpacked: bool) -> Fp4Weight:
    """Weights as the checkpoint stores them (docs/checkpoint.md section 3) in the form of the kernels.

    Args:
        packed: uint8 or int8 [E, rows, K / 2], contiguous; with `unpacked` its bits are moved IN PLACE, expert by
            expert, and the result shares its memory. Without, it is not changed.
        scale: E8M0 [E, rows, K / 32] (uint8 or float8_e8m0fnu); copied.
        unpacked: see `Fp4Weight`; wanted for "bf16" activations and below sm_100.

    Raises ValueError where K is not a multiple of 128.
    """
    num_experts, num_rows, half = packed.shape
    if half % (SCALE_BLOCK // 2) or not packed.is_contiguous():
        raise ValueError(
            f"relayout: packed is {list(packed.shape)} with strides {packed.stride()}; "
            f"expected contiguous [E, rows, K / 2], K a multiple of {SCALE_BLOCK}"
        )
    scales = (
        scale.view(torch.uint8).view(num_experts, num_rows, 2 * half // SCALE_BLOCK, 4).transpose(1, 2).contiguous()
    )
    values = packed.view(torch.uint8)
    if unpacked:
        for expert in values:
            expert.copy_(_arrange(expert))
        values = values.view(torch.int32)
    return Fp4Weight(values, scales, unpacked)


def empty_experts(num_experts: int, num_rows: int, depth: int, *, unpacked: bool, device: torch.device) -> Fp4Weight:
    """Weights [E, rows, K] to be written by `write_expert`. Raises ValueError where K is not a multiple of 128."""
    if depth % SCALE_BLOCK:
        raise ValueError(f"empty_experts: K is {depth}; expected a multiple of {SCALE_BLOCK}")
    values = torch.empty(num_experts, num_rows, depth // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(num_experts, depth // SCALE_BLOCK, num_rows, 4, dtype=torch.uint8, device=device)
    return Fp4Weight(values.view(torch.int32) if unpacked else values, scales, unpacked)


def write_expert(weight: Fp4Weight, expert: int, first_row: int, packed: Tensor, scale: Tensor) -> None:
    """Store a matrix of one expert as the checkpoint has it, see `relayout`, as rows first_row .. of its weight.

    Args:
        packed: uint8 or int8 [n, K / 2]; scale: E8M0 [n, K / 32] (uint8 or float8_e8m0fnu); on the weight's device.
    """
    num_rows = packed.shape[0]
    rows = slice(first_row, first_row + num_rows)
    packed = packed.view(torch.uint8)
    weight.values[expert, rows].view(torch.uint8).copy_(_arrange(packed) if weight.unpacked else packed)
    grouped = scale.view(torch.uint8).view(num_rows, -1, 4).transpose(0, 1)
    weight.scales[expert, :, rows].copy_(grouped)


def _arrange(packed: Tensor) -> Tensor:
    """Codes uint8 [rows, K / 2] with their bits where the module docstring says."""
    num_rows, half = packed.shape
    byte = packed.view(num_rows, half // 16, 4, 4).to(torch.int32)  # [rows, b, h, c]
    word = torch.zeros(num_rows, half // 16, 4, dtype=torch.int32, device=packed.device)
    for e in range(2):
        for h in range(4):
            code = byte[:, :, h] >> (4 * e)
            for mask, shift in MOVES[h]:
                word |= (code & mask) << (shift + 16 * e)
    return word.view(torch.uint8).view(num_rows, half)
