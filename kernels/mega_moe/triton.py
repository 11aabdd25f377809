"""The experts of a layer in two launches: `gate_up` and `down` (experts.py, of large tiles on Hopper hopper.py).

Equal to `mega_moe` of the reference at every rounding point. In decode the shared expert stands in the same launches;
in prefill its products have tiles of their own, so they are launches of their own (shared.py). In deterministic mode
they always are.

What comes out are parts, one for each expert of a token and one for the shared expert, bfloat16 as the reference rounds
them. Whoever takes them adds them: the next hyper-connection, or `combine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
import triton
from torch import Tensor

from dsv4_kernels.capability import is_hopper, num_multiprocessors
from dsv4_kernels.dependent import launches_early
from dsv4_kernels.deterministic import is_deterministic
from dsv4_kernels.gemm.fp8 import Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.mega_moe.combine import combine
from dsv4_kernels.mega_moe.experts import down, gate_up
from dsv4_kernels.mega_moe.hopper import TOKENS, down_specialized, gate_up_specialized
from dsv4_kernels.mega_moe.reference import Activations
from dsv4_kernels.mega_moe.shared import shared_expert
from dsv4_kernels.mega_moe.tiles import Tiles, make_tiles
from dsv4_kernels.mega_moe.weights import Form, Fp4Weight
from dsv4_kernels.quant import triton as quant

TILES = (16, 32, 64, 128)  # pairs of a tile
ACTIVATIONS: dict[Form, tuple[Activations, ...]] = {
    "fp4": ("fp8", "fp4"),
    "fp8": ("fp8",),
    "bf16": get_args(Activations),
}
SHARED_TOKENS = 16  # of a tile of the shared expert, where it stands beside tiles of TILES[0] pairs


@dataclass(frozen=True)
class Homes:
    """Where the outputs of several ranks' tokens go: into the memory of the rank that each token lives on."""

    addresses: Tensor  # int64 [ranks], of their memory
    offset: int  # bytes, a multiple of 16: of bfloat16 [rank_tokens, K, D] in all of it
    rank_tokens: int  # of each rank


def choose_tile(num_tokens: int, top_k: int, num_experts: int, form: Form) -> int:
    """Half as many pairs again as an expert has on average, so that most experts fit into one tile."""
    tiles = TILES if form == "fp4" else TILES[:-1]  # a weight in registers leaves no room for the sums of the largest
    return next((tile for tile in tiles if 2 * tile * num_experts >= 3 * num_tokens * top_k), tiles[-1])


def mega_moe(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w13: Fp4Weight,
    w2: Fp4Weight,
    shared_w13: Fp8Weight,
    shared_w2: Fp8Weight,
    *,
    limit: float,
    activations: Activations,
    tile_tokens: int | None = None,
) -> Tensor:
    """`reference.mega_moe` with `quantize_shared`: bfloat16 [T, D].

    Args:
        x: bfloat16 [T, D]; expert_ids int32 or int64 [T, K], -1 for none; weights float32 [T, K]. All contiguous.
        w13, w2: from `relayout`, both in the same form; [E, 2I, D] and [E, D, I], D and I multiples of 128.
        shared_w13, shared_w2: [2I, D], gate rows first, and [D, I].
        limit: swiglu clamp.
        activations: "bf16", "fp8" or "fp4" of the routed experts. Their weights must have a form for it: "bf16" takes
            all, "fp8" "fp8", "fp4" "fp8" and "fp4".
        tile_tokens: 16, 32, 64 or (for the form "fp4") 128 pairs a tile; by default chosen from the shapes. A routed
            expert's sums have the same order with all of them.

    Rows without any expert are padding and are not written. Raises ValueError for anything else.
    """
    _check(x, expert_ids, weights, w13, w2, activations, tile_tokens)
    num_experts, (num_tokens, top_k) = w13.num_experts, expert_ids.shape
    tile_tokens = tile_tokens or choose_tile(num_tokens, top_k, num_experts, w13.form)
    parts = expert_parts(
        *rounded_inputs(x, activations, w13.form), quantize_rows(x), weights,
        make_tiles(expert_ids, num_experts, tile_tokens), w13, w2, shared_w13, shared_w2,
        limit=limit, activations=activations,
    )  # fmt: skip
    return combine(parts[:, :top_k], parts[:, top_k], expert_ids)


def expert_parts(
    inputs: Tensor,
    input_scales: Tensor,
    rows: Fp8Rows,
    weights: Tensor,
    tiles: Tiles,
    w13: Fp4Weight,
    w2: Fp4Weight,
    shared_w13: Fp8Weight,
    shared_w2: Fp8Weight,
    *,
    limit: float,
    activations: Activations,
) -> Tensor:
    """What each expert of a token says, then the shared expert: bfloat16 [T, K + 1, D], to be added.

    Args:
        inputs, input_scales: x as the first routed product reads it. Weights of the form "bf16" take bfloat16 values
            that are rounded already, and anything as scales; the others codes, also as uint8, and scales of any
            strides.
        rows: x as the shared expert reads it.
        weights: float32 [T, K]. tiles: of the expert ids [T, K]. The rest as in `mega_moe`; nothing is checked.

    Part k is that of the token's expert k, and unset where that is -1. To have the sum of the reference, add a token's
    parts in float32 in the order of expert ids, the shared one last, and round once: in the order of k, if `route` made
    the ids, which it gives in ascending order.
    """
    num_tokens, top_k = weights.shape
    parts = torch.empty(num_tokens, top_k + 1, w13.depth, dtype=torch.bfloat16, device=inputs.device)
    beside = tiles.tile_tokens == TILES[0] and not is_deterministic()
    shared = (rows, shared_w13, shared_w2) if beside else None
    _products(inputs, input_scales, shared, weights, tiles, w13, w2, parts, limit, activations)
    if not beside:
        parts[:, top_k] = shared_expert(rows, shared_w13, shared_w2, limit=limit)
    return parts


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
    """The parts of the routed experts alone: bfloat16 [T * K, D] by the number of the pair, unset without an expert.

    For ranks that hold some of the experts. Arguments as in `expert_parts` and `mega_moe`; nothing is checked.
    """
    num_tokens, top_k = expert_ids.shape
    tile_tokens = tile_tokens or choose_tile(num_tokens, top_k, w13.num_experts, w13.form)
    tiles = make_tiles(expert_ids, w13.num_experts, tile_tokens)
    outputs = torch.empty(num_tokens * top_k, w13.depth, dtype=torch.bfloat16, device=inputs.device)
    parts = outputs.view(num_tokens, top_k, w13.depth)
    _products(inputs, input_scales, None, weights, tiles, w13, w2, parts, limit, activations)
    return outputs


def send_outputs(
    homes: Homes,
    inputs: Tensor,
    input_scales: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w13: Fp4Weight,
    w2: Fp4Weight,
    *,
    limit: float,
    activations: Activations,
    tile_tokens: int,
) -> None:
    """`pair_outputs` of the tokens of all ranks, rank by rank, each stored where its token lives once it is there.

    So the way back is under the products.
    """
    tiles = make_tiles(expert_ids, w13.num_experts, tile_tokens)
    _products(inputs, input_scales, None, weights, tiles, w13, w2, homes, limit, activations)


def _products(
    inputs: Tensor,
    input_scales: Tensor,
    shared: tuple[Fp8Rows, Fp8Weight, Fp8Weight] | None,
    weights: Tensor,
    tiles: Tiles,
    w13: Fp4Weight,
    w2: Fp4Weight,
    parts: Tensor | Homes,
    limit: float,
    activations: Activations,
) -> None:
    """Both launches, into parts [T, K or K + 1, D]; with the shared expert's rows and weights it is the last part."""
    (num_tokens, top_k), hidden, width = weights.shape, w13.depth, w2.depth
    if num_tokens == 0:
        return
    format_ = "bf16" if w13.form == "bf16" else {"fp8": "e4m3", "fp4": "e2m1"}[activations]
    if format_ == "e4m3":
        inputs = inputs.view(torch.float8_e4m3fn)
    sizes = {"bf16": (width, 0), "e4m3": (width, width // 128), "e2m1": (width // 2, width // 32)}
    row_size, scale_row = sizes[format_]
    middle = torch.empty(num_tokens * top_k, row_size, dtype=inputs.dtype, device=inputs.device)
    middle_scales = torch.empty(num_tokens * top_k, scale_row, dtype=torch.uint8, device=inputs.device)
    # Without the shared expert a small tile's kernel is the same, over none of its tokens: left out of it, ptxas finds
    # no way to do with as many registers.
    shared_middle = unread = inputs.view(torch.float8_e4m3fn), inputs.view(torch.uint8)
    shared_up = shared_down = unread * 2
    exponent_steps, shared_tokens = (0, 0), 0
    if shared is not None:
        rows, shared_w13, shared_w2 = shared
        shared_middle = quantized = (
            torch.empty(num_tokens, width, dtype=torch.float8_e4m3fn, device=inputs.device),
            torch.empty(num_tokens, width // 128, dtype=torch.uint8, device=inputs.device),
        )
        shared_up = (shared_w13.codes, shared_w13.exponents, rows.codes, rows.exponents)
        shared_down = (shared_w2.codes, shared_w2.exponents, *quantized)
        exponent_steps, shared_tokens = rows.exponents.stride(), num_tokens
    tile_tokens, table = tiles.tile_tokens, (tiles.pairs, tiles.experts, tiles.firsts, tiles.counts)
    if isinstance(parts, Homes):
        target, rank_tokens, places = parts.addresses, parts.rank_tokens, {"PARTS": top_k, "PARTS_AT": parts.offset}
    else:
        target, rank_tokens, places = parts, 0, {"PARTS": parts.shape[1], "PARTS_AT": -1}
    if w13.form == "fp8" and tile_tokens == TOKENS.value and hidden % 256 == 0 and is_hopper(inputs.device):
        grid, num_tiles = (num_multiprocessors(inputs.device),), len(tiles.experts)
        options = {"TOP_K": top_k, "num_warps": 4, "launch_pdl": launches_early(inputs.device)}
        gate_up_specialized[grid](
            w13.values, w13.scales.view(torch.int32), w13.row_scales, inputs.view(torch.int32), input_scales, *table,
            weights, middle, middle_scales, width, limit, num_tiles, *input_scales.stride(), DEPTH=hidden, **options,
        )  # fmt: skip
        down_specialized[grid](
            w2.values, w2.scales.view(torch.int32), w2.row_scales, middle.view(torch.int32), middle_scales, *table,
            target, hidden, num_tiles, scale_row, rank_tokens, DEPTH=width, **places, **options,
        )  # fmt: skip
        return
    # What keeps everything in registers (tests/kernels/test_compile_gate.py). Native FP4 needs 4 or 8 warps.
    num_tiles = triton.cdiv(shared_tokens, SHARED_TOKENS) + len(tiles.experts)
    blocks = {
        "TOP_K": top_k,
        "FORM": w13.form,
        "FORMAT": format_,
        "BLOCK_N": tile_tokens,
        "SHARED_N": SHARED_TOKENS if tile_tokens == TILES[0] else 0,
        "SHARED_STAGES": 3,
        "num_stages": 4 if tile_tokens < 64 else 3,
    }
    gate_up[(width // 128, num_tiles)](
        w13.values, w13.scales, w13.row_scales, inputs, input_scales, *table, weights, middle, middle_scales,
        *shared_up, *shared_middle, width, limit, shared_tokens, *input_scales.stride(), *exponent_steps,
        DEPTH=hidden, ROUND=activations, BLOCK_M=256, num_warps=8,
        maxnreg=128 if tile_tokens == TILES[0] else None,  # two programs on a multiprocessor
        **blocks,
        launch_pdl=launches_early(inputs.device),
    )  # fmt: skip
    down[(hidden // 128, num_tiles)](
        w2.values, w2.scales, w2.row_scales, middle, middle_scales, *table, *shared_down, target, hidden,
        shared_tokens, scale_row, rank_tokens,
        DEPTH=width, BLOCK_M=128, num_warps=8 if tile_tokens == TILES[-1] else 4, **places, **blocks,
        launch_pdl=launches_early(inputs.device),
    )  # fmt: skip


def rounded_inputs(x: Tensor, activations: Activations, form: Form) -> tuple[Tensor, Tensor]:
    """x bfloat16 [T, D] as the first routed product reads it, and its scales, as `expert_parts` takes them."""
    if activations == "bf16":
        return x, x
    if activations == "fp8":
        return (quant.fake_quantize_fp8(x, 128), x) if form == "bf16" else quant.quantize_fp8(x, 128)
    return (quant.fake_quantize_fp4(x), x) if form == "bf16" else quant.quantize_fp4(x)


def _check(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w13: Fp4Weight,
    w2: Fp4Weight,
    activations: str,
    tile_tokens: int | None,
) -> None:
    if activations not in get_args(Activations):
        raise ValueError(f"mega_moe: activations is {activations!r}; allowed: {', '.join(get_args(Activations))}")
    if tile_tokens not in (None, *TILES) or (w13.form != "fp4" and tile_tokens == TILES[-1]):
        raise ValueError(f"mega_moe: tile_tokens is {tile_tokens}; allowed: {TILES}, the last for the form 'fp4' only")
    if w13.form != w2.form or activations not in ACTIVATIONS[w13.form]:
        raise ValueError(
            f"mega_moe: w13.form is {w13.form!r}, w2.form {w2.form!r}, activations {activations!r}; both weights have "
            f"one form, for activations {', '.join(ACTIVATIONS[w13.form])}"
        )
    hidden, width = x.shape[1], w2.depth
    if w13.num_rows != 2 * width or w13.depth != hidden or w2.num_rows != hidden or hidden % 128 or width % 128:
        raise ValueError(
            f"mega_moe: x is {list(x.shape)}, w13 [E, {w13.num_rows}, {w13.depth}], w2 [E, {w2.num_rows}, {w2.depth}]; "
            "expected x [T, D], w13 [E, 2I, D], w2 [E, D, I] with D and I multiples of 128"
        )
    for name, tensor in (("x", x), ("expert_ids", expert_ids), ("weights", weights)):
        if not tensor.is_contiguous():
            raise ValueError(f"mega_moe: {name} has strides {tensor.stride()}; expected a contiguous tensor")
    if x.dtype is not torch.bfloat16 or weights.dtype is not torch.float32:
        raise ValueError(f"mega_moe: x is {x.dtype}, weights {weights.dtype}; expected bfloat16, float32")
