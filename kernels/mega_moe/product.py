"""One tile of an expert's product: FP4 weights of a routed expert, or the FP8 ones of the shared expert.

Rows of the weight are the rows of a tile and tokens its columns, because few tokens fill no 128 rows, which tensor
cores want (tcgen05 for FP4 at all), and 16 columns are enough.

What a routed expert multiplies:
- sm_100 and later multiply FP4 by FP4 or by E4M3 with a scale per 32 of each (`tl.dot_scaled`): the checkpoint's codes
  and those of the activations go in as they are. A scale per 128 is given four times.
- Hopper has no FP4. A code times a small power of two is an E4M3 number, and the scales of a row are so near one
  another that such powers are all that differs within it (weights.py). So E4M3 inputs meet E4M3 weights that are made
  in registers (`_unpack_fp8`); a scale per 128 of the inputs makes each 128 a sum of its own, as in every FP8 product
  here, and the row's own scale comes last. The unit keeps sums of 128 to about 14 bits (gemm/triton.py).
- bf16 activations take bf16 weights made in registers (`_unpack`) on all GPUs, and so do activations that were rounded
  to FP4 where the tensor cores have none. This is exact, at half the FP8 rate.
The shared expert's weights are E4M3 with a scale per 128 x 128, its inputs E4M3 per 128 (gemm/triton.py says why each
128 is a sum of its own on Hopper).
The order of the sums over K inside a tensor core is its own; everything before and after is as in the reference.

DEPTH is a constant so that no loop may be empty: a way around it, on which sums are zero, makes the compiler wait for
each product of Hopper's (tests/kernels/test_compile_gate.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from dsv4_kernels.quant.device import power_of_two

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _times(words, factor):
    """Both bf16 halves of int32 words times those of `factor`: one instruction, of which Triton alone makes four."""
    if INTERPRETED:
        low = words.to(tl.uint16).to(tl.bfloat16, bitcast=True) * factor.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (words >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = high * (factor >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return low.to(tl.uint16, bitcast=True).to(tl.int32) | (high.to(tl.uint16, bitcast=True).to(tl.int32) << 16)
    return tl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [words, factor], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _unpack(words, scale, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weights times 2^-32, bf16 [BLOCK_M, BLOCK_K], of int32 words [BLOCK_M, BLOCK_K / 8] as weights.py arranges them.

    A masked word is two bf16 numbers that are 2^-126 times their FP4 values, its own exponent being the lowest. The
    scale 2^(byte - 127) and 2^94 make up for it; 2^126 would not leave room for scales above 2.
    """
    factor = ((scale.to(tl.int32) + 94) << 7) * 65537
    words = tl.reshape(words, (BLOCK_M, BLOCK_K // 32, 4))
    factor = tl.broadcast_to(factor[:, :, None], (BLOCK_M, BLOCK_K // 32, 4))
    turned = words.to(tl.uint32, bitcast=True)
    turned = ((turned >> 4) | (turned << 28)).to(tl.int32, bitcast=True)
    first = _times(words & -2118090304, factor)  # bits 15, 8, 7, 6 of both halves
    second = _times((words << 6) & -2118090304, factor)
    third = _times(turned & -2118090304, factor)
    fourth = _times(((words << 2) & -2134867776) | ((words >> 6) & 0x01000100), factor)
    four = tl.join(tl.join(first, third), tl.join(second, fourth))  # [rows, groups, 4, 2, 2]
    low = four.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (four >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    values = tl.join(low, high)  # b, c, h low bit.., e
    return tl.reshape(tl.permute(values, (0, 1, 3, 4, 2, 5)), (BLOCK_M, BLOCK_K))


@triton.jit
def _look_up(low, high, selectors):
    """Bytes of the eight in int32 `low` and `high` that the four lowest nibbles of `selectors` name, 0 to 7 each."""
    if INTERPRETED:
        found = selectors & 0
        for place in tl.static_range(4):
            wanted = (selectors >> (4 * place)) & 7
            word = tl.where(wanted < 4, low, high)
            found |= ((word >> (8 * (wanted & 3))) & 255) << (8 * place)
        return found
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selectors], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def e4m3_words(words, steps):
    """Weights over their row's scale, four e4m3 in an int32, of words and their steps (weights.py), int32 of one shape:
    those of h = 0, and those of h = 1."""
    shift = (steps - 5) * 8  # of the exponents in a table of 0, 0.5, 1, 1.5; 2, 3, 4, 6
    low, high = shift * 0x01010100 + 0x3C383000, shift * 0x01010101 + 0x4C484440
    selectors = words & 0x77777777
    first = _look_up(low, high, selectors) | (words & -2139062144)  # signs at bits 7, 15, 23, 31
    return first, _look_up(low, high, selectors >> 16) | ((words << 4) & -2139062144)


@triton.jit
def _unpack_fp8(words, steps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weights over their row's scale, e4m3 [BLOCK_M, BLOCK_K], of int32 words [BLOCK_M, BLOCK_K / 8] and uint8 steps
    [BLOCK_M, BLOCK_K / 32], see weights.py."""
    words = tl.reshape(words, (BLOCK_M, BLOCK_K // 32, 4))
    steps = tl.broadcast_to(steps.to(tl.int32)[:, :, None], (BLOCK_M, BLOCK_K // 32, 4))
    first, second = e4m3_words(words, steps)
    both = tl.join(first, second)  # [rows, groups, c, h]
    even = tl.join(both.to(tl.uint8), (both >> 16).to(tl.uint8))  # e = 0, 2
    odd = tl.join((both >> 8).to(tl.uint8), (both >> 24).to(tl.uint8))  # e = 1, 3
    values = tl.permute(tl.join(even, odd), (0, 1, 3, 2, 4, 5))  # [rows, groups, h, c, e / 2, e % 2]
    return tl.reshape(values, (BLOCK_M, BLOCK_K)).to(tl.float8e4nv, bitcast=True)


@triton.jit
def multiply_fp4(
    weights,  # of this expert, as weights.py has them
    scales,
    row_scales,
    row,  # [BLOCK_M] rows of the weight
    num_rows,
    inputs,  # [.., depth]: bf16, e4m3, or two FP4 a byte [.., depth / 2]
    input_scales,  # uint8 [.., depth / 128] of e4m3, [.., depth / 32] of FP4; strides scale_row and scale_step
    scale_row,
    scale_step,
    input_row,  # int64 [BLOCK_N]
    keep,  # bool [BLOCK_N]
    DEPTH: tl.constexpr,
    FORM: tl.constexpr,  # of the weights
    FORMAT: tl.constexpr,  # of inputs: "bf16", "e4m3", "e2m1"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """f32 [BLOCK_M, BLOCK_N]: rows of the weight times rows of the inputs."""
    BLOCK_K: tl.constexpr = 128
    ZERO: tl.constexpr = 0 if FORMAT == "e2m1" else 0.0
    PACK: tl.constexpr = 2 if FORMAT == "e2m1" else 1
    WORD: tl.constexpr = 2 if FORM == "fp4" else 8
    word = tl.arange(0, BLOCK_K // WORD)
    column = tl.arange(0, BLOCK_K // PACK)
    group = tl.arange(0, BLOCK_K // 32)
    weights += row[:, None] * (128 // WORD) + word[None, :]
    scales += row[:, None] * 4 + group[None, :]
    inputs += input_row[None, :] * (DEPTH // PACK) + column[:, None]
    if FORM == "fp8":
        input_scales += input_row * scale_row
    elif FORMAT == "e4m3":
        input_scales += input_row[:, None] * scale_row + (group // 4)[None, :] * scale_step
    elif FORMAT == "e2m1":
        input_scales += input_row[:, None] * scale_row + group[None, :] * scale_step
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, DEPTH, BLOCK_K):
        weight = tl.load(weights)
        scale = tl.load(scales)
        values = tl.load(inputs, mask=keep[None, :], other=ZERO)
        if FORM == "bf16":
            acc = tl.dot(_unpack(weight, scale, BLOCK_M, BLOCK_K), values, acc)
        elif FORM == "fp8":
            value_scale = tl.load(input_scales, mask=keep, other=0)  # on its way while this block multiplies
            acc += tl.dot(_unpack_fp8(weight, scale, BLOCK_M, BLOCK_K), values) * power_of_two(value_scale)[None, :]
            input_scales += scale_step
        else:
            value_scale = tl.load(input_scales, mask=keep[:, None], other=0)
            acc = tl.dot_scaled(weight, scale, "e2m1", values, value_scale, FORMAT, acc)
            input_scales += scale_step if FORMAT == "e4m3" else 4 * scale_step
        weights += num_rows * (128 // WORD)
        scales += num_rows * 4
        inputs += BLOCK_K // PACK
    if FORM == "bf16":
        acc *= 4294967296.0  # 2^32, see _unpack
    elif FORM == "fp8":
        acc *= power_of_two(tl.load(row_scales + row))[:, None]
    return acc


@triton.jit
def _fp8_scales(weight_exponents, input_exponents, block, step):
    """Scales of a block of 128 inputs: f32 of the weight's rows and of the inputs' rows."""
    return power_of_two(tl.load(weight_exponents + block)), power_of_two(tl.load(input_exponents + block * step))


@triton.jit
def multiply_fp8(
    weights,  # e4m3 [.., depth]
    exponents,  # uint8 [.. / 128, depth / 128]
    row,  # [BLOCK_M] rows of the weight
    inputs,  # e4m3 [.., depth]
    input_exponents,  # uint8 [.., depth / 128], strides exponent_row and exponent_step
    exponent_row,
    exponent_step,
    input_row,  # int64 [BLOCK_N]
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """f32 [BLOCK_M, BLOCK_N]: rows of an FP8 weight times rows of the inputs."""
    k = tl.arange(0, 128)
    blocks: tl.constexpr = DEPTH // 128
    weights += row.to(tl.int64)[:, None] * DEPTH + k[None, :]
    inputs += input_row[None, :] * DEPTH + k[:, None]
    exponents += row // 128 * blocks
    input_exponents += input_row * exponent_row
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    scale, input_scale = _fp8_scales(exponents, input_exponents, 0, exponent_step)
    for block in tl.range(0, blocks, num_stages=NUM_STAGES):
        weight = tl.load(weights)
        values = tl.load(inputs)
        if cuda_capability_geq(10):
            group = tl.zeros([1, 4], tl.int32)
            weight_scale = tl.load(exponents[:, None] + block + group)
            value_scale = tl.load(input_exponents[:, None] + block * exponent_step + group)
            acc = tl.dot_scaled(weight, weight_scale, "e4m3", values, value_scale, "e4m3", acc)
        else:
            # Bytes are not copied ahead by the pipeline: the next scales are on their way while this block multiplies.
            following = _fp8_scales(exponents, input_exponents, tl.minimum(block + 1, blocks - 1), exponent_step)
            acc += tl.dot(weight, values) * scale[:, None] * input_scale[None, :]
            scale, input_scale = following
        weights += 128
        inputs += 128
    return acc
