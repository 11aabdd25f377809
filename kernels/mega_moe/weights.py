"""The FP4 weights of all experts of a layer, laid out once at load for the Triton kernels.

Values and scales of 128 neighbouring inputs lie together for all rows, [E, K / 128, rows, ..]: what a program reads in
one step is one piece of memory, 64 bytes of values and 4 of scales a row. In the checkpoint [E, rows, K / 2] it would
be half a cache line from each of its rows.

Codes stay as in the checkpoint where tensor cores take FP4 (sm_100 and later). Elsewhere they must become bf16 in
registers, and unpacking limits the speed, so the bits are moved to where this costs least. The 32-bit word (b, c) of a
row holds the weights k = 32 b + 8 h + 2 c + e, h in 0..3 and e in 0..1: those a thread needs for four steps of the bf16
instruction, whose registers hold the neighbours e = 0, 1 in their halves. A code is sign, two bits of exponent,
mantissa; as a bf16 number they are bits 15, 8, 7 and 6 of a half. Half e of the word holds, of each h,

    bit    15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
    h       0  3  3  2  2  2  1  0  0  0  3  3  2  1  1  1

so that h = 0 is there after a mask, h = 1 after a shift by 6 to the left and a mask, h = 2 after a rotation by 4 to
the right (its sign is in the other half of the word), and h = 3 needs two shifts: sign, low exponent bit and mantissa
by 2 to the left, high exponent bit by 6 to the right. Nine operations for eight weights. Seven would need a set of
bits that covers a half with four rotations of {15, 8, 7, 6}: there is none, nor one with three and a single shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # inputs whose values and scales lie together
VALUE_BYTES, SCALE_BYTES = BLOCK // 2, BLOCK // 32  # of a row, in a block
WORD_BITS = 32
# For each h, where the bits of a code go: its bit (0 = mantissa .. 3 = sign) -> bit of the word, for half 0.
MOVES = ((6, 7, 8, 15), (0, 1, 2, 9), (10, 11, 12, 19), (4, 5, 14, 13))


@dataclass(frozen=True)
class Fp4Weight:
    """FP4 weights [E, rows, K] in the form that the kernels read; made by `relayout`."""

    values: Tensor  # uint8 [E, K / 128, rows, 64], the checkpoint's codes; unpacked: int32 [E, K / 128, rows, 16]
    scales: Tensor  # E8M0 bytes uint8 [E, K / 128, rows, 4]
    unpacked: bool  # for tensor cores that have no FP4: the kernels make bf16 of it

    @property
    def num_experts(self) -> int:
        """E."""
        return self.values.shape[0]

    @property
    def num_rows(self) -> int:
        """Outputs of each expert."""
        return self.values.shape[2]

    @property
    def depth(self) -> int:
        """Inputs of each expert, K."""
        return self.scales.shape[1] * BLOCK


def relayout(packed: Tensor, scale: Tensor, *, unpacked: bool) -> Fp4Weight:
    """Weights as the checkpoint stores them (docs/checkpoint.md section 3) in the form of the kernels.

    Args:
        packed: uint8 or int8 [E, rows, K / 2], contiguous; its bytes are moved IN PLACE, expert by expert, and the
            result shares its memory.
        scale: E8M0 [E, rows, K / 32] (uint8 or float8_e8m0fnu); copied.
        unpacked: see `Fp4Weight`; wanted for "bf16" activations and below sm_100.

    Raises ValueError where K is not a multiple of 128.
    """
    num_experts, num_rows, half = packed.shape
    if half % VALUE_BYTES or not packed.is_contiguous():
        raise ValueError(
            f"relayout: packed is {list(packed.shape)} with strides {packed.stride()}; "
            f"expected contiguous [E, rows, K / 2], K a multiple of {BLOCK}"
        )
    codes = packed.view(torch.uint8)
    values = codes.view(num_experts, -1, num_rows, VALUE_BYTES)
    for expert, target in zip(codes, values, strict=True):
        target.copy_(_by_block(_arrange(expert) if unpacked else expert.clone(), VALUE_BYTES))
    scales = torch.stack([_by_block(expert, SCALE_BYTES) for expert in scale.view(torch.uint8)])
    return Fp4Weight(values.view(torch.int32) if unpacked else values, scales, unpacked)


def empty_experts(num_experts: int, num_rows: int, depth: int, *, unpacked: bool, device: torch.device) -> Fp4Weight:
    """Weights [E, rows, K] to be written by `write_expert`. Raises ValueError where K is not a multiple of 128."""
    if depth % BLOCK:
        raise ValueError(f"empty_experts: K is {depth}; expected a multiple of {BLOCK}")
    blocks = num_experts, depth // BLOCK, num_rows
    values = torch.empty(*blocks, VALUE_BYTES, dtype=torch.uint8, device=device)
    scales = torch.empty(*blocks, SCALE_BYTES, dtype=torch.uint8, device=device)
    return Fp4Weight(values.view(torch.int32) if unpacked else values, scales, unpacked)


def write_expert(weight: Fp4Weight, expert: int, first_row: int, packed: Tensor, scale: Tensor) -> None:
    """Store a matrix of one expert as the checkpoint has it, see `relayout`, as rows first_row .. of its weight.

    Args:
        packed: uint8 or int8 [n, K / 2]; scale: E8M0 [n, K / 32] (uint8 or float8_e8m0fnu); on the weight's device.
    """
    rows = slice(first_row, first_row + packed.shape[0])
    packed = packed.view(torch.uint8)
    values = _by_block(_arrange(packed) if weight.unpacked else packed, VALUE_BYTES)
    weight.values[expert, :, rows].view(torch.uint8).copy_(values)
    weight.scales[expert, :, rows].copy_(_by_block(scale.view(torch.uint8), SCALE_BYTES))


def _by_block(rows: Tensor, size: int) -> Tensor:
    """Bytes [rows, blocks * size] as [blocks, rows, size]."""
    return rows.view(len(rows), -1, size).transpose(0, 1).contiguous()


def _arrange(packed: Tensor) -> Tensor:
    """Codes uint8 [rows, K / 2] with their bits where the module docstring says."""
    num_rows, half = packed.shape
    byte = packed.view(num_rows, half // 16, 4, 4).to(torch.int32)  # [rows, b, h, c]
    word = torch.zeros(num_rows, half // 16, 4, dtype=torch.int32, device=packed.device)
    for e in range(2):
        for h in range(4):
            code = byte[:, :, h] >> (4 * e)
            for bit, place in enumerate(MOVES[h]):
                word |= ((code >> bit) & 1) << ((place + 16 * e) % WORD_BITS)
    return word.view(torch.uint8).view(num_rows, half)
