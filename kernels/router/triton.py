"""Expert routing in Triton, in one launch: scores in slices of the hidden size, and the last programs choose.

Many tokens get their logits from the library's product, where that is faster (gemm/library.py).

Equal to `route` of the reference, with a token's experts in the order of their ids. Three times the last of several
programs goes on (ADR 7): of the slices of a tile of logits, to add them and make scores of them; of the tiles of the
same tokens, to choose for these; and of all, to put the pairs of few tokens into the tiles of the expert products.
Meanwhile the programs of the first experts round x for those products, if they are asked to.

Accuracy of the logits: a bfloat16 weight (the checkpoint's type) times a bfloat16 x is exact in float32, and only the
sum rounds; a float32 weight is multiplied as three TF32 products. Relative norm of the error against float64 below 1e-5
for both. The choice is exact for given scores, so it differs from the reference's only between experts that are closer
than that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.arrival import counters, is_last
from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.deterministic import is_deterministic
from dsv4_kernels.gemm import library
from dsv4_kernels.mega_moe.tiles import FEW_PAIRS, Tiles, fill_few, fill_tiles
from dsv4_kernels.quant.triton import store_quantized

BLOCK_E = 64  # experts of a tile: rows of the tensor cores
ROWS = 8  # tokens that are chosen for together; more cost registers


@triton.jit
def _tokens(positions, first, num_tokens, NUM: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """Numbers int64 [NUM] of tokens, which of them there are, and which of them are no padding."""
    token = first + tl.arange(0, NUM)
    inside = token < num_tokens
    keep = inside
    if HAS_POSITIONS:
        keep = inside & (tl.load(positions + token, mask=inside, other=-1) >= 0)
    return token, inside, keep


@triton.jit
def _part(
    x, gate_weight, expert, real, token, keep, first, size, hidden,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """f32 [BLOCK_E, BLOCK_T]: products over the hidden dims first .. first + size."""
    dim = first + tl.arange(0, BLOCK_D)
    weights = gate_weight + expert[:, None] * hidden + dim[None, :]
    inputs = x + token[None, :] * hidden + dim[:, None]
    acc = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    for done in range(0, size, BLOCK_D):
        inside = tl.arange(0, BLOCK_D) < hidden - first - done
        weight = tl.load(weights, mask=real[:, None] & inside[None, :], other=0.0)
        values = tl.load(inputs, mask=inside[:, None] & keep[None, :], other=0.0)
        if weight.dtype == tl.bfloat16 and values.dtype == tl.bfloat16:
            acc = tl.dot(weight, values, acc)
        else:
            acc = tl.dot(weight.to(tl.float32), values.to(tl.float32), acc, input_precision="tf32x3")
        weights += BLOCK_D
        inputs += BLOCK_D
    return acc


@triton.jit
def _round(x, rounded, token, keep, first, size, hidden):
    """Hidden dims first .. first + size of x as the values that FP8 makes of them."""
    for done in range(0, size, 128):
        dim = first + done + tl.arange(0, 128)
        at = token[:, None] * hidden + dim[None, :]
        values = tl.load(x + at, mask=keep[:, None] & (dim < hidden)[None, :], other=0.0).to(tl.float32)
        store_quantized(values, rounded, rounded, token, keep, first + done, hidden, 0, 0, 128, False, False)


@triton.jit
def _score(logits):
    """Square root of softplus. log(1 + u), u = exp(-|logit|) <= 1, is 2 atanh(u / (2 + u)): a series in s^2 <= 1/9."""
    u = tl.exp(-tl.abs(logits))
    s = u / (2.0 + u)
    square = s * s
    series = 1.0 / 17.0
    for i in tl.static_range(8):
        series = series * square + 1.0 / (15.0 - 2.0 * i)
    return tl.sqrt_rn(tl.where(logits > 0.0, logits, 0.0) + 2.0 * s * series)


@triton.jit
def _best(scores, bias, keep, num_experts, choice, TOP_K: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Experts int32 [rows, lanes] of the best biased scores; `scores` are pointers [rows, 1] to the rows."""
    expert = tl.arange(0, BLOCK)
    real = expert < num_experts
    biased = tl.load(scores + expert[None, :], mask=keep & real[None, :], other=0.0)
    if HAS_BIAS:
        biased += tl.load(bias + expert, mask=real, other=0.0)[None, :]
    bits = biased.to(tl.int32, bitcast=True)  # in the order of the values, NaN above all as torch sorts it
    keys = tl.where(biased == biased, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    keys = tl.where(real[None, :], keys, -0x80000000)
    chosen = tl.full([keep.shape[0], choice.shape[1]], BLOCK, tl.int32)
    for k in tl.static_range(TOP_K):
        best = keys == tl.max(keys, axis=1)[:, None]
        best = tl.min(tl.where(best, expert[None, :], BLOCK), axis=1)[:, None]
        keys = tl.where(expert[None, :] == best, -0x80000000, keys)
        chosen = tl.where(choice == k, best, chosen)
    return chosen


@triton.jit
def _choose(
    scores, bias, tid2eid, token_ids, positions, weights, expert_ids, first, scale, num_tokens, num_experts,
    TOP_K: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HASHED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Experts and weights of the tokens first .. first + ROWS; padding has none."""
    token, inside, keep = _tokens(positions, first, num_tokens, ROWS, HAS_POSITIONS)
    choice = tl.arange(0, LANES)[None, :]
    mine = keep[:, None] & (choice < TOP_K)
    rows = scores + token[:, None] * num_experts
    if HASHED:
        table = tid2eid + tl.load(token_ids + token, mask=keep, other=0)[:, None] * TOP_K
        chosen = tl.load(table + choice, mask=mine, other=BLOCK).to(tl.int32)
    else:
        chosen = _best(rows, bias, keep[:, None], num_experts, choice, TOP_K, BLOCK, HAS_BIAS)
    chosen = tl.sort(chosen)  # lanes beyond TOP_K are last
    picked = tl.load(rows + chosen, mask=mine, other=0.0)
    picked *= (scale / tl.where(keep, tl.sum(picked, axis=1), 1.0))[:, None]
    at = token[:, None] * TOP_K + choice
    written = inside[:, None] & (choice < TOP_K)
    tl.store(expert_ids + at, tl.where(mine, chosen, -1).to(tl.int64), mask=written)
    tl.store(weights + at, tl.where(mine, picked, 0.0), mask=written)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _route(
    x,  # [tokens, hidden]
    gate_weight,  # [experts, hidden]
    bias,  # f32 [experts], with HAS_BIAS
    tid2eid,  # [vocab, TOP_K], with HASHED
    token_ids,  # [tokens], with HASHED
    positions,  # int32 [tokens], -1 = padding, with HAS_POSITIONS
    arrived,  # int32, zero: of all, of each tile of tokens, of each tile of logits
    partials,  # f32 [slices, tokens, experts]; with GIVEN the logits
    scores,  # f32 [tokens, experts]
    weights,  # f32 [tokens, TOP_K]
    expert_ids,  # int64 [tokens, TOP_K]
    rounded,  # [tokens, hidden], with ROUNDS
    pairs,  # of Tiles, with TILE
    tile_experts,
    tile_firsts,
    tile_counts,
    scale,
    num_tokens,
    num_experts,
    num_tiles,
    hidden,
    slice_size,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,  # TOP_K padded to a power of two
    BLOCK: tl.constexpr,  # num_experts padded to a power of two
    HAS_BIAS: tl.constexpr,
    HASHED: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    ROUNDS: tl.constexpr,  # x is rounded too
    TILE: tl.constexpr,  # pairs of a tile, 0 = tiles are not filled
    BINS: tl.constexpr,  # more than num_experts, a power of two
    PAIRS: tl.constexpr,  # at least all pairs, a power of two
    GIVEN: tl.constexpr,  # x has been multiplied
    SLICES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,  # tokens that are chosen for together
):
    wait_for_previous()
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    real = expert < num_experts
    first_token = tl.program_id(1).to(tl.int64) * BLOCK_T
    token, _, keep = _tokens(positions, first_token, num_tokens, BLOCK_T, HAS_POSITIONS)
    first = tl.program_id(2) * slice_size
    at = token[None, :] * num_experts + expert[:, None]
    mine = real[:, None] & keep[None, :]
    step = num_tokens.to(tl.int64) * num_experts
    if not GIVEN:
        acc = _part(x, gate_weight, expert, real, token, keep, first, slice_size, hidden, BLOCK_E, BLOCK_T, BLOCK_D)
        tl.store(partials + tl.program_id(2) * step + at, acc, mask=mine)
    if ROUNDS:
        if GIVEN:  # the programs of a tile of tokens share its row
            _round(x, rounded, token, keep, tl.program_id(0) * slice_size, slice_size, hidden)
        elif tl.program_id(0) == 0:
            _round(x, rounded, token, keep, first, slice_size, hidden)

    tile_number = 1 + tl.num_programs(1) + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if is_last(arrived + tile_number, SLICES):
        logits = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
        for part in tl.static_range(1 if GIVEN else SLICES):  # all loads are under way together
            logits += tl.load(partials + part * step + at, mask=mine, other=0.0)
        tl.store(scores + at, _score(logits), mask=mine)
        if is_last(arrived + 1 + tl.program_id(1), tl.num_programs(0)):
            for done in range(0, tl.minimum(num_tokens - first_token, BLOCK_T), ROWS):
                _choose(
                    scores, bias, tid2eid, token_ids, positions, weights, expert_ids, first_token + done, scale,
                    num_tokens, num_experts, TOP_K, LANES, BLOCK, ROWS, HAS_BIAS, HASHED, HAS_POSITIONS,
                )  # fmt: skip
            if TILE > 0:  # noqa: SIM102
                if is_last(arrived, tl.num_programs(1)):
                    fill_few(
                        expert_ids, pairs, tile_experts, tile_firsts, tile_counts, num_tokens * TOP_K, num_experts,
                        num_tiles, TILE, BINS, PAIRS,
                    )  # fmt: skip


def tile_of(num_tokens: int, hidden: int) -> tuple[int, int]:
    """Tokens and hidden dims of one program: few tokens make few tiles, so more programs share a product.

    Up to 64 tokens 84 programs a tile (Pro) read 64 KB of weights each, and the last adds 14 slices of 4 KB. The last
    of a tile's tokens chooses for ROWS of them at a time, about 1.2 us each time: so tiles grow slowly.
    In deterministic mode all take the middle: 42 programs a tile on Pro, 11 KB of partial sums a token.
    """
    if is_deterministic():
        return 32, 1024
    if num_tokens <= 64:
        return 16, 512
    if num_tokens <= 1024:
        return (32 if num_tokens <= 256 else 64), 1024
    return 64, triton.cdiv(hidden, 128) * 128


def route(
    x: Tensor,
    gate_weight: Tensor,
    *,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    token_ids: Tensor,
    top_k: int,
    scale: float,
    positions: Tensor | None = None,
    tiles: Tiles | None = None,
    rounded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.route`: weights float32 [T, K] and expert ids int64 [T, K], of each token in the order of the ids.

    Args:
        x: bfloat16 or float32 [T, D]; gate_weight: bfloat16 or float32 [E, D], E >= top_k. All tensors contiguous.
        bias, tid2eid, token_ids, top_k, scale: as in the reference.
        positions: int32 [T]; rows with -1 are padding, get experts -1 and weights 0, and nothing else of them is read.
        tiles: empty, of T * K pairs; filled, for up to FEW_PAIRS pairs in the same launch.
        rounded: bfloat16 [T, D], D a multiple of 128; gets the values that FP8 makes of x, not in padding rows.

    Raises ValueError for anything else.
    """
    (num_tokens, hidden), num_experts = x.shape, gate_weight.shape[0]
    if gate_weight.shape[1] != hidden or top_k > num_experts:
        raise ValueError(
            f"route: x is {list(x.shape)}, gate_weight {list(gate_weight.shape)}, top_k {top_k}; "
            "expected [T, D] and [E, D] with E >= top_k"
        )
    if rounded is not None and hidden % 128:
        raise ValueError(f"route: x is {list(x.shape)}; to round it, D must be a multiple of 128")
    optional = {"bias": bias, "tid2eid": tid2eid, "positions": positions, "rounded": rounded}
    for name, tensor in ({"x": x, "gate_weight": gate_weight, "token_ids": token_ids} | optional).items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"route: {name} has strides {tensor.stride()}; expected a contiguous tensor")
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=x.device)
    expert_ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=x.device)
    if num_tokens == 0:
        return weights, expert_ids
    exact = x.dtype is torch.bfloat16 and gate_weight.dtype is torch.bfloat16
    given = exact and library.is_for_library(x)
    block_t, slice_size = (ROWS, hidden) if given else tile_of(num_tokens, hidden)
    grid = triton.cdiv(num_experts, BLOCK_E), triton.cdiv(num_tokens, block_t), triton.cdiv(hidden, slice_size)
    if given:
        slice_size = triton.cdiv(hidden, 128 * grid[0]) * 128
    if given:
        partials = library.linear_bf16(x, gate_weight)
    else:
        partials = torch.empty(grid[2], num_tokens, num_experts, dtype=torch.float32, device=x.device)
    few = tiles is not None and num_tokens * top_k <= FEW_PAIRS
    table = (tiles.pairs, tiles.experts, tiles.firsts, tiles.counts) if few else (expert_ids,) * 4
    _route[grid](
        x,
        gate_weight,
        partials if bias is None else bias,
        expert_ids if tid2eid is None else tid2eid,
        token_ids,
        expert_ids if positions is None else positions,
        counters(x.device, 1 + grid[1] + grid[0] * grid[1]),
        partials,
        torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device),
        weights,
        expert_ids,
        x if rounded is None else rounded,
        *table,
        scale,
        num_tokens,
        num_experts,
        len(table[1]),
        hidden,
        slice_size,
        TOP_K=top_k,
        LANES=triton.next_power_of_2(top_k),
        BLOCK=triton.next_power_of_2(num_experts),
        HAS_BIAS=bias is not None,
        HASHED=tid2eid is not None,
        HAS_POSITIONS=positions is not None,
        ROUNDS=rounded is not None,
        TILE=tiles.tile_tokens if few else 0,
        BINS=triton.next_power_of_2(num_experts + 1),
        PAIRS=max(128, triton.next_power_of_2(num_tokens * top_k)) if few else 1,
        GIVEN=given,
        SLICES=grid[2],
        BLOCK_E=BLOCK_E,
        BLOCK_T=block_t,
        BLOCK_D=64 if exact else 32,  # three products need more registers (tests/kernels/test_compile_gate.py)
        ROWS=ROWS,
        num_warps=8,
        num_stages=4 if exact else 3,
        maxnreg=128,  # two programs on a multiprocessor
        launch_pdl=launches_early(x.device),
    )
    if tiles is not None and not few:
        fill_tiles(tiles, expert_ids, num_experts)
    return weights, expert_ids
