"""The FP4 weights of all experts of a layer, laid out once at load for the Triton kernels.

Values and scales of 128 neighbouring inputs lie together for all rows, [E, K / 128, rows, ..]: what a program reads in
one step is one piece of memory, 64 bytes of values and 4 of scales a row. In the checkpoint [E, rows, K / 2] it would
be half a cache line from each of its rows.

What the tensor cores multiply is the weight's form:

"fp4": codes stay as in the checkpoint, for tensor cores that take FP4 (sm_100 and later).

"fp8": E4M3 for Hopper, where the inputs are E4M3, too. Unpacking limits the speed, so the bits are moved to where it
costs least. The 32-bit word (b, c) of a row holds the weights k = 32 b + 16 h + 4 c + e, h in 0..1 and e in 0..3: those
a thread needs for one step of the instruction, four in a register. Its nibble 4 h + e holds the magnitude of (h, e) as
the selector of a byte permutation, which looks all four up in a table of eight bytes; the fourth bits hold signs, at
those of bits 7, 15, 23, 31 of h = 0, four lower of h = 1, so that a mask finds them where E4M3 has them. Seven
operations for eight weights. The table depends on the scale: an E4M3 number is a code times 2^d, `scales` holds d + 5
in 0..11 and `row_scales` the power of two that all of a row have in common. A block of 32 whose scale is more than
2^11 below its row's largest has its codes rounded to what 2^-11 of that can say, and is counted.

"bf16", on all GPUs for inputs that are bf16: the word (b, c) holds the weights k = 32 b + 8 h + 2 c + e, h in 0..3 and
e in 0..1. A code is sign, two bits of exponent, mantissa; as a bf16 number they are bits 15, 8, 7 and 6 of a half.
Half e of the word holds, of each h,

    bit    15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
    h       0  3  3  2  2  2  1  0  0  0  3  3  2  1  1  1

so that h = 0 is there after a mask, h = 1 after a shift by 6 to the left and a mask, h = 2 after a rotation by 4 to
the right (its sign is in the other half of the word), and h = 3 needs two shifts: sign, low exponent bit and mantissa
by 2 to the left, high exponent bit by 6 to the right. Nine operations for eight weights. Seven would need a set of
bits that covers a half with four rotations of {15, 8, 7, 6}: there is none, nor one with three and a single shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["fp4", "fp8", "bf16"]
FIRST_FP4 = 10  # compute capability (major) of the first tensor cores that multiply FP4 as it is stored
BLOCK = 128  # inputs whose values and scales lie together
VALUE_BYTES, SCALE_BYTES = BLOCK // 2, BLOCK // 32  # of a row, in a block
WORD_BITS = 32
# For each h, where the bits of a code go: its bit (0 = mantissa .. 3 = sign) -> bit of the word, for half 0.
MOVES = ((6, 7, 8, 15), (0, 1, 2, 9), (10, 11, 12, 19), (4, 5, 14, 13))
MOST_STEPS = 11  # powers of two between the scales of a row that E4M3 holds, FP4's magnitudes being 0.5 to 6:
TOP = 6  # the largest makes 6 x 2^6 = 384 of 448, and 0.5 x 2^-5 is E4M3's smallest normal number


def form_for(activations: str, capability: int) -> Form:
    """The form for these inputs on tensor cores of this compute capability's major number."""
    if activations == "bf16":
        return "bf16"
    if capability >= FIRST_FP4:
        return "fp4"
    return "fp8" if activations == "fp8" else "bf16"


@dataclass(frozen=True)
class Fp4Weight:
    """FP4 weights [E, rows, K] in the form that the kernels read; made by `relayout`."""

    values: Tensor  # uint8 [E, K / 128, rows, 64], the checkpoint's codes; else int32 [E, K / 128, rows, 16]
    scales: Tensor  # E8M0 bytes uint8 [E, K / 128, rows, 4]; "fp8": above the least of the row
    row_scales: Tensor  # E8M0 bytes uint8 [E, rows] of "fp8"; else [E, 0]
    form: Form

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


def relayout(packed: Tensor, scale: Tensor, *, form: Form) -> Fp4Weight:
    """Weights as the checkpoint stores them (docs/checkpoint.md section 3) in the form of the kernels.

    Args:
        packed: uint8 or int8 [E, rows, K / 2], contiguous; its bytes are moved IN PLACE, expert by expert, and the
            result shares its memory.
        scale: E8M0 [E, rows, K / 32] (uint8 or float8_e8m0fnu); copied.
        form: see the module.

    Raises ValueError where K is not a multiple of 128.
    """
    num_experts, num_rows, half = packed.shape
    if half % VALUE_BYTES or not packed.is_contiguous():
        raise ValueError(
            f"relayout: packed is {list(packed.shape)} with strides {packed.stride()}; "
            f"expected contiguous [E, rows, K / 2], K a multiple of {BLOCK}"
        )
    codes = packed.view(torch.uint8)
    made = _empty(codes.view(num_experts, -1, num_rows, VALUE_BYTES), form)
    for expert, (own, bytes_) in enumerate(zip(codes, scale.view(torch.uint8), strict=True)):
        write_expert(made, expert, 0, own.clone(), bytes_)
    return made


def empty_experts(num_experts: int, num_rows: int, depth: int, *, form: Form, device: torch.device) -> Fp4Weight:
    """Weights [E, rows, K] to be written by `write_expert`. Raises ValueError where K is not a multiple of 128."""
    if depth % BLOCK:
        raise ValueError(f"empty_experts: K is {depth}; expected a multiple of {BLOCK}")
    size = num_experts, depth // BLOCK, num_rows, VALUE_BYTES
    return _empty(torch.empty(size, dtype=torch.uint8, device=device), form)


def _empty(values: Tensor, form: Form) -> Fp4Weight:
    """Of values whose memory is there, uint8 [E, K / 128, rows, 64]."""
    num_experts, num_blocks, num_rows, _ = values.shape
    size = num_experts, num_rows if form == "fp8" else 0
    return Fp4Weight(
        values if form == "fp4" else values.view(torch.int32),
        torch.empty(num_experts, num_blocks, num_rows, SCALE_BYTES, dtype=torch.uint8, device=values.device),
        torch.empty(size, dtype=torch.uint8, device=values.device),
        form,
    )


def write_expert(weight: Fp4Weight, expert: int, first_row: int, packed: Tensor, scale: Tensor) -> int:
    """Store a matrix of one expert as the checkpoint has it, see `relayout`, as rows first_row .. of its weight.
    Returns how many groups of 32 had to be rounded for that.

    Args:
        packed: uint8 or int8 [n, K / 2]; scale: E8M0 [n, K / 32] (uint8 or float8_e8m0fnu); on the weight's device.
    """
    rows = slice(first_row, first_row + packed.shape[0])
    packed, scale, num_rounded = packed.view(torch.uint8), scale.view(torch.uint8), 0
    if weight.form == "fp8":
        packed, scale, weight.row_scales[expert, rows], num_rounded = _with_row_scales(packed, scale)
        packed = _arrange_nibbles(packed)
    elif weight.form == "bf16":
        packed = _arrange(packed)
    weight.values[expert, :, rows].view(torch.uint8).copy_(_by_block(packed, VALUE_BYTES))
    weight.scales[expert, :, rows].copy_(_by_block(scale, SCALE_BYTES))
    return num_rounded


def fill_scales(weight: Fp4Weight, exponent: int) -> None:
    """Give all groups the scale of the E8M0 byte `exponent`."""
    if weight.form == "fp8":
        weight.scales.fill_(MOST_STEPS)
        weight.row_scales.fill_(exponent - TOP)
    else:
        weight.scales.fill_(exponent)


def _with_row_scales(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Codes, steps of their scales above the least that their row can have, uint8 [rows, K / 32] in 0..MOST_STEPS, the
    rows' common scales, E8M0 bytes uint8 [rows], and how many groups were rounded."""
    # Blocks of zeros may have any scale; they must not lift or lower the others.
    is_zero = (packed.view(*scale.shape, 16) & 0x77 == 0).all(-1)
    scale = torch.where(is_zero, 0, scale.int())
    least = (scale.amax(1, keepdim=True) - MOST_STEPS).clamp_min(0)
    steps = (scale - least).clamp_min(0)
    too_small = ((least - scale).clamp_min(0) * ~is_zero).clamp_max(5)
    num_rounded = int(too_small.count_nonzero())
    if num_rounded:
        packed = _shifted_codes(packed, too_small)
    return packed, steps.to(torch.uint8), (least.squeeze(1) + MOST_STEPS - TOP).to(torch.uint8), num_rounded


def _shifted_codes(packed: Tensor, shifts: Tensor) -> Tensor:
    """Codes of the nearest FP4 numbers to the given ones over 2^shift, shifts int32 [rows, K / 32] in 0..5."""
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=packed.device)
    wanted = grid / 2.0 ** torch.arange(6, device=packed.device).unsqueeze(1)
    table = (wanted.unsqueeze(-1) - grid).abs().argmin(-1)  # [shift, magnitude]
    halves = torch.stack([packed & 15, packed >> 4], -1).view(*shifts.shape, 32).long()
    moved = table[shifts.long().unsqueeze(-1), halves & 7] | (halves & 8)
    moved = moved.view(len(packed), -1, 2).to(torch.uint8)
    return moved[..., 0] | (moved[..., 1] << 4)


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


def _arrange_nibbles(packed: Tensor) -> Tensor:
    """Codes uint8 [rows, K / 2] as the words of "fp8"."""
    num_rows, half = packed.shape
    byte = packed.view(num_rows, half // 16, 2, 4, 2).to(torch.int32)  # [rows, b, h, c, e / 2]
    code = torch.stack([byte & 15, byte >> 4], -1).flatten(-2)  # [rows, b, h, c, e]
    word = torch.zeros(num_rows, half // 16, 4, dtype=torch.int32, device=packed.device)
    for h in range(2):
        for e in range(4):
            word |= (code[:, :, h, :, e] & 7) << (4 * (4 * h + e))
            word |= (code[:, :, h, :, e] >> 3) << (8 * e + (3 if h else 7))
    return word.view(torch.uint8).view(num_rows, half)
