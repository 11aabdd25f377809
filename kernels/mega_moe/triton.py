"""The routed experts in Triton, with FP4 weights in memory; the shared expert's output is given and added.

Equal to `mega_moe` of the reference at every rounding point. Launches: round x (unless it
stays bf16), `_fill_tiles`, `_gate_up`, `_down`, `_combine`; no copy of x in expert order, tokens are gathered by index.

Rows of the weight are the rows of a tile and tokens its columns, because few tokens fill no 128 rows, which tensor
cores want (tcgen05 for FP4 at all), and 16 columns are enough. A tile of `_gate_up` holds 128 gate rows and the 128 up
rows that belong to them: the group of 128 that shares an FP8 scale is then in one program, and is rounded there.

What multiplies what:
- sm_100 and later multiply FP4 by FP4 or by E4M3 with a scale per 32 of each (`tl.dot_scaled`): the checkpoint's codes
  and those of the activations go in as they are. A scale per 128 is given four times.
- Hopper has no FP4, and its FP8 product does not help. The weight's scale per 32 does not fit into E4M3, so the partial
  product of each 32 inputs would be scaled and added outside of the tensor cores: one float32 operation a sum, which
  takes as long as the FP8 product itself, on sums that the unit keeps to about 14 bits. FP4 times a power of two is
  exact in bf16, and so are activations that were rounded to FP8 or FP4. So both become bf16: the weight in registers
  (`_unpack`), x and the hidden values once, when they are rounded. This is exact, at half the FP8 rate.
- bf16 activations take that path on all GPUs.
The order of the sums over K inside a tensor core is its own; everything before and after is as in the reference.
"""

from __future__ import annotations

from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.mega_moe.reference import Activations
from dsv4_kernels.mega_moe.tiles import make_tiles
from dsv4_kernels.mega_moe.weights import Fp4Weight
from dsv4_kernels.quant import triton as quant
from dsv4_kernels.quant.triton import store_quantized

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
    first = _times(words & -2118090304, factor)
    second = _times((words << 3) & -2118090304, factor)
    third = _times((words << 6) & -2118090304, factor)
    fourth = ((words << 1) & -2147450880) | ((words >> 3) & 0x01800180) | ((words >> 7) & 0x00400040)
    fourth = _times(fourth, factor)
    four = tl.join(tl.join(first, third), tl.join(second, fourth))  # [rows, groups, 4, 2, 2]
    low = four.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (four >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    values = tl.join(low, high)  # b, c, h low bit.., e
    return tl.reshape(tl.permute(values, (0, 1, 3, 4, 2, 5)), (BLOCK_M, BLOCK_K))


@triton.jit
def _multiply(
    weights,  # uint8 [num_rows, depth / 2] of this expert
    scales,  # uint8 [depth / 128, num_rows, 4] of this expert
    row,  # [BLOCK_M] rows of the weight
    num_rows,
    inputs,  # [.., depth]: bf16, e4m3, or two FP4 a byte [.., depth / 2]
    input_scales,  # uint8 [.., depth / 128] of e4m3, [.., depth / 32] of FP4
    input_row,  # int64 [BLOCK_N]
    keep,  # bool [BLOCK_N]
    depth,
    FORMAT: tl.constexpr,  # of inputs: "bf16", "e4m3", "e2m1"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """f32 [BLOCK_M, BLOCK_N]: rows of the weight times rows of the inputs."""
    ZERO: tl.constexpr = 0 if FORMAT == "e2m1" else 0.0
    PACK: tl.constexpr = 2 if FORMAT == "e2m1" else 1
    WORD: tl.constexpr = 8 if FORMAT == "bf16" else 2
    word = tl.arange(0, BLOCK_K // WORD)
    column = tl.arange(0, BLOCK_K // PACK)
    group = tl.arange(0, BLOCK_K // 32)
    weights += row[:, None] * (depth // WORD) + word[None, :]
    scales += (group // 4 * num_rows * 4 + group % 4)[None, :] + row[:, None] * 4
    inputs += input_row[None, :] * (depth // PACK) + column[:, None]
    if FORMAT == "e4m3":
        input_scales += input_row[:, None] * (depth // 128) + (group // 4)[None, :]
    if FORMAT == "e2m1":
        input_scales += input_row[:, None] * (depth // 32) + group[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, depth, BLOCK_K):
        weight = tl.load(weights)
        scale = tl.load(scales)
        values = tl.load(inputs, mask=keep[None, :], other=ZERO)
        if FORMAT == "bf16":
            acc = tl.dot(_unpack(weight, scale, BLOCK_M, BLOCK_K), values, acc)
        else:
            value_scale = tl.load(input_scales, mask=keep[:, None], other=0)
            acc = tl.dot_scaled(weight, scale, "e2m1", values, value_scale, FORMAT, acc)
            input_scales += BLOCK_K // 128 if FORMAT == "e4m3" else BLOCK_K // 32
        weights += BLOCK_K // WORD
        scales += BLOCK_K // 128 * num_rows * 4
        inputs += BLOCK_K // PACK
    if FORMAT == "bf16":
        acc *= 4294967296.0  # 2^LIFT
    return acc


@triton.jit
def _gate_up(
    weights,  # uint8 [experts, 2 * width, depth / 2]
    scales,  # uint8 [experts, depth / 128, 2 * width, 4]
    inputs,  # [tokens, ..], see _multiply
    input_scales,
    pairs,
    tile_experts,
    tile_firsts,
    tile_counts,
    routing,  # f32 [pairs]
    hidden,  # [pairs, width], in the order of `pairs`; in the form of `inputs`
    hidden_scales,
    depth,
    width,
    limit,
    TOP_K: tl.constexpr,
    FORMAT: tl.constexpr,
    ROUND: tl.constexpr,  # "bf16", "fp8", "fp4": of the hidden values
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """SwiGLU of one tile of pairs, BLOCK_M / 2 hidden values each."""
    expert = tl.load(tile_experts + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    HALF: tl.constexpr = BLOCK_M // 2
    first = tl.load(tile_firsts + tl.program_id(1))
    pair_in_tile = tl.arange(0, BLOCK_N)
    keep = pair_in_tile < tl.load(tile_counts + tl.program_id(1))
    pair = tl.load(pairs + first + pair_in_tile, mask=keep, other=0)
    column = tl.program_id(0) * HALF
    lane = tl.arange(0, BLOCK_M)
    acc = _multiply(
        weights + expert * width * (depth // (4 if FORMAT == "bf16" else 1)),
        scales + expert * width * (depth // 16),
        column + lane % HALF + (lane // HALF) * width,
        2 * width,
        inputs,
        input_scales,
        (pair // TOP_K).to(tl.int64),
        keep,
        depth,
        FORMAT,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    both = tl.permute(tl.reshape(acc.to(tl.bfloat16), (2, HALF, BLOCK_N)), (1, 2, 0))
    gate, up = tl.split(both)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    gate = tl.where(gate > limit, limit, gate)  # and not minimum, which drops NaN
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    value = gate / (1.0 + tl.exp(-gate)) * up * tl.load(routing + pair, mask=keep, other=0.0)[None, :]
    value = tl.trans(value.to(tl.bfloat16))  # [BLOCK_N, HALF]
    place = (first + pair_in_tile).to(tl.int64)
    if ROUND == "bf16":
        at = place[:, None] * width + (column + tl.arange(0, HALF))[None, :]
        tl.store(hidden + at, value, mask=keep[:, None])
    else:
        GROUP: tl.constexpr = 128 if ROUND == "fp8" else 32
        store_quantized(
            value.to(tl.float32),
            hidden,
            hidden_scales,
            place,
            keep,
            column,
            width,
            width // GROUP,
            1,
            GROUP,
            ROUND == "fp4",
            FORMAT != "bf16",
        )


@triton.jit
def _down(
    weights,  # uint8 [experts, num_rows, depth / 2]
    scales,  # uint8 [experts, depth / 128, num_rows, 4]
    hidden,  # [pairs, ..], in the order of `pairs`, see _multiply
    hidden_scales,
    pairs,
    tile_experts,
    tile_firsts,
    tile_counts,
    outputs,  # bf16 [pairs, num_rows], by the number of the pair
    depth,
    num_rows,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The second product of one tile of pairs, BLOCK_M output dims each."""
    expert = tl.load(tile_experts + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tile_firsts + tl.program_id(1))
    pair_in_tile = tl.arange(0, BLOCK_N)
    keep = pair_in_tile < tl.load(tile_counts + tl.program_id(1))
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = _multiply(
        weights + expert * num_rows * (depth // (8 if FORMAT == "bf16" else 2)),
        scales + expert * num_rows * (depth // 32),
        row,
        num_rows,
        hidden,
        hidden_scales,
        (first + pair_in_tile).to(tl.int64),
        keep,
        depth,
        FORMAT,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    pair = tl.load(pairs + first + pair_in_tile, mask=keep, other=0).to(tl.int64)
    tl.store(outputs + pair[None, :] * num_rows + row[:, None], acc.to(tl.bfloat16), mask=keep[None, :])


@triton.jit
def _combine(
    outputs,  # bf16 [tokens * TOP_K, hidden]
    shared,  # bf16 [tokens, hidden]
    ids,  # [tokens, TOP_K]
    out,  # bf16 [tokens, hidden]
    hidden,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,  # TOP_K padded to a power of two
    BLOCK: tl.constexpr,
):
    """A token's expert outputs in the order of expert ids, then the shared expert, float32, rounded once."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    expert = tl.load(ids + token * TOP_K + lane, mask=lane < TOP_K, other=-1).to(tl.int32)
    count = tl.sum((expert >= 0).to(tl.int32))
    if count == 0:
        return
    key = tl.where(expert < 0, 0x7FFFFFFF, expert)
    before = (key[None, :] < key[:, None]) | ((key[None, :] == key[:, None]) & (lane[None, :] < lane[:, None]))
    place = tl.sum(before.to(tl.int32), axis=1)
    dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = dim < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, count):
        pair = token * TOP_K + tl.sum(tl.where(place == i, lane, 0))
        total += tl.load(outputs + pair * hidden + dim, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(shared + token * hidden + dim, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + dim, total.to(tl.bfloat16), mask=inside)


TILES = (16, 32, 64, 128)  # pairs of a tile


def choose_tile(num_tokens: int, top_k: int, num_experts: int, activations: str) -> int:
    """Half as many pairs again as an expert has on average, so that most experts fit into one tile."""
    tiles = TILES[:-1] if activations == "bf16" else TILES  # no form of the largest works for bf16 on both targets
    return next((tile for tile in tiles if 2 * tile * num_experts >= 3 * num_tokens * top_k), tiles[-1])


def mega_moe(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w13: Fp4Weight,
    w2: Fp4Weight,
    shared: Tensor,
    *,
    limit: float,
    activations: Activations,
    tile_tokens: int | None = None,
) -> Tensor:
    """`reference.mega_moe` with the shared expert's output given: bfloat16 [T, D].

    Args:
        x: bfloat16 [T, D]; shared: bfloat16 [T, D]; expert_ids int32 or int64 [T, K], -1 for none; weights float32
            [T, K]. All contiguous.
        w13, w2: from `relayout`, both in the same form; [E, 2I, D] and [E, D, I], D and I multiples of 128.
        limit: swiglu clamp.
        activations: "bf16", "fp8" or "fp4"; "bf16" needs the unpacked form of the weights.
        tile_tokens: 16, 32, 64 or (not for "bf16") 128 pairs a tile; by default chosen from the shapes. With one value,
            a token's result does not depend on its batch.

    Rows without any expert are padding: nothing is read or written for them. Raises ValueError for anything else.
    """
    _check(x, expert_ids, weights, w13, w2, shared, activations, tile_tokens)
    inputs = _rounded(x, activations, _form(w13, activations))
    outputs = pair_outputs(
        *inputs, expert_ids, weights, w13, w2, limit=limit, activations=activations, tile_tokens=tile_tokens
    )
    return combine(outputs, shared, expert_ids)


def pair_outputs(
    inputs: Tensor,
    input_scales: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w13: Fp4Weight,
    w2: Fp4Weight,
    *,
    limit: float,
    activations: Activations,
    tile_tokens: int | None = None,
) -> Tensor:
    """What each pair's expert says: bfloat16 [T * K, D] by the number of the pair, unset for pairs without an expert.

    `inputs` and `input_scales` are x as the first product reads it: bfloat16 values, rounded already, with anything as
    scales, for the unpacked form of the weights; codes and scales of `quantize_fp8` or `quantize_fp4`, also as uint8,
    for the other. The rest as in `mega_moe`; nothing is checked.
    """
    (num_tokens, top_k), hidden = expert_ids.shape, w13.depth
    num_experts, width = w13.num_experts, w2.depth
    outputs = torch.empty(num_tokens * top_k, hidden, dtype=torch.bfloat16, device=inputs.device)
    if num_tokens == 0:
        return outputs
    form = _form(w13, activations)
    if form == "e4m3":
        inputs = inputs.view(torch.float8_e4m3fn)
    tile_tokens = tile_tokens or choose_tile(num_tokens, top_k, num_experts, activations)
    tiles = make_tiles(expert_ids, num_experts, tile_tokens)
    num_tiles, num_pairs = len(tiles.experts), num_tokens * top_k
    table = (tiles.pairs, tiles.experts, tiles.firsts, tiles.counts)
    rows, scale_rows = {"bf16": (width, 0), "e4m3": (width, width // 128), "e2m1": (width // 2, width // 32)}[form]
    middle = torch.empty(num_pairs, rows, dtype=inputs.dtype, device=inputs.device)
    middle_scales = torch.empty(num_pairs, scale_rows, dtype=torch.uint8, device=inputs.device)
    # What keeps everything in registers (tests/kernels/test_compile_gate.py). Native FP4 needs 4 or 8 warps.
    large = tile_tokens == 128
    blocks = {"FORMAT": form, "BLOCK_N": tile_tokens, "BLOCK_K": 128, "num_stages": 4 if tile_tokens < 64 else 3}
    _gate_up[(width // 128, num_tiles)](
        w13.values, w13.scales, inputs, input_scales, *table, weights, middle, middle_scales, hidden, width, limit,
        TOP_K=top_k, ROUND=activations, BLOCK_M=256, num_warps=16 if large and w13.unpacked else 8, **blocks,
    )  # fmt: skip
    _down[(hidden // 128, num_tiles)](
        w2.values, w2.scales, middle, middle_scales, *table, outputs, width, hidden,
        BLOCK_M=128, num_warps=8 if large else 4, **blocks,
    )  # fmt: skip
    return outputs


def combine(outputs: Tensor, shared: Tensor, expert_ids: Tensor) -> Tensor:
    """Outputs bfloat16 [T * K, D] of the pairs in the order of expert ids, then `shared` [T, D]: float32, rounded once.

    Rows without any expert are not written.
    """
    (num_tokens, top_k), hidden = expert_ids.shape, shared.shape[1]
    out = torch.empty_like(shared)
    block = min(1024, triton.next_power_of_2(hidden))
    if num_tokens:
        _combine[(num_tokens, triton.cdiv(hidden, block))](
            outputs, shared, expert_ids, out, hidden, TOP_K=top_k, LANES=triton.next_power_of_2(top_k), BLOCK=block
        )
    return out


def _form(weight: Fp4Weight, activations: str) -> str:
    """How the first product reads its inputs; see `_multiply`."""
    return "bf16" if weight.unpacked else {"fp8": "e4m3", "fp4": "e2m1"}[activations]


def _rounded(x: Tensor, activations: str, form: str) -> tuple[Tensor, Tensor]:
    """x as the first product reads it, and its scales (anything where the form has none)."""
    if activations == "bf16":
        return x, x
    if activations == "fp8":
        return quant.quantize_fp8(x, 128) if form == "e4m3" else (quant.fake_quantize_fp8(x, 128), x)
    return quant.quantize_fp4(x) if form == "e2m1" else (quant.fake_quantize_fp4(x), x)


def _check(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w13: Fp4Weight,
    w2: Fp4Weight,
    shared: Tensor,
    activations: str,
    tile_tokens: int | None,
) -> None:
    if activations not in get_args(Activations):
        raise ValueError(f"mega_moe: activations is {activations!r}; allowed: {', '.join(get_args(Activations))}")
    if tile_tokens not in (None, *TILES) or (activations == "bf16" and tile_tokens == TILES[-1]):
        raise ValueError(f"mega_moe: tile_tokens is {tile_tokens}; allowed: {TILES}, the last not with bf16")
    if w13.unpacked != w2.unpacked or (activations == "bf16" and not w13.unpacked):
        raise ValueError(
            f"mega_moe: w13.unpacked is {w13.unpacked}, w2.unpacked {w2.unpacked}, activations {activations!r}; "
            "both weights have one form, and bf16 activations need the unpacked one"
        )
    hidden, width = x.shape[1], w2.depth
    if w13.num_rows != 2 * width or w13.depth != hidden or w2.num_rows != hidden or hidden % 128 or width % 128:
        raise ValueError(
            f"mega_moe: x is {list(x.shape)}, w13 [E, {w13.num_rows}, {w13.depth}], w2 [E, {w2.num_rows}, {w2.depth}]; "
            "expected x [T, D], w13 [E, 2I, D], w2 [E, D, I] with D and I multiples of 128"
        )
    for name, tensor in (("x", x), ("shared", shared), ("expert_ids", expert_ids), ("weights", weights)):
        if not tensor.is_contiguous():
            raise ValueError(f"mega_moe: {name} has strides {tensor.stride()}; expected a contiguous tensor")
    if x.dtype is not torch.bfloat16 or shared.dtype is not torch.bfloat16 or weights.dtype is not torch.float32:
        raise ValueError(
            f"mega_moe: x is {x.dtype}, shared {shared.dtype}, weights {weights.dtype}; "
            "expected bfloat16, bfloat16, float32"
        )
