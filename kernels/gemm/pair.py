"""Two products over the same tokens in one launch, side by side: one in FP8, one in bfloat16.

A layer's attention takes its normed input twice: in E4M3 for the latent, in bfloat16 for what compressors and indexer
read. Few tokens split each product into about as many programs as there are multiprocessors, so alone each of them
waits for its own memory at its start and its end; together they fill these times (ADR 7, rule 3). The programs of the
bfloat16 product come first, because they read most.

Of few tokens the program that completes the last of the latent's columns also makes the norm of the query latent: that
product is the smaller one, so most of it happens while the other still reads.

Up to 32 tokens three programs fit on a multiprocessor of Hopper, as of either product. Up to 64 it is one, as of the
FP8 product alone; two of the other would fit, but it has no two for each multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.arrival import counters, is_last
from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.deterministic import is_deterministic
from dsv4_kernels.gemm import triton as gemm
from dsv4_kernels.gemm.device import multiply_tile
from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.quantize import empty_rows
from dsv4_kernels.norm.device import norm_rows

MOST_TOKENS = 64  # of one launch; more fill the GPU with either product alone


FEW = 8  # most tokens whose norm one program can make; more take longer than a launch
NORM_ROWS = 4


# Not compiled anew for other numbers of tokens.
@triton.jit(do_not_specialize=["num_tokens", "block_step", "normed_block_step"])
def _pair(
    x,  # bf16 [tokens, depth], rows x_row apart
    matrix,  # bf16 [num_rows, depth]
    arrived,
    parts,
    out,  # [tokens, num_rows]
    codes,  # e4m3 [tokens, depth], rows code_row apart
    exponents,  # uint8 [tokens, depth / 128], strides token_step and block_step
    weight,  # e4m3 [fp8_rows, depth]
    weight_exponents,
    fp8_arrived,
    fp8_parts,
    fp8_out,  # [tokens, fp8_rows]
    num_tokens,
    depth,
    num_rows,
    fp8_rows,
    x_row,
    code_row,
    token_step,
    block_step,
    norm,  # float32 [128 * NORM_TILES]
    normed,  # e4m3 [tokens, 128 * NORM_TILES]
    normed_exponents,  # uint8 [tokens, NORM_TILES], strides normed_token_step and normed_block_step
    normed_scales,  # of `store_scales`
    normed_token_step,
    normed_block_step,
    eps,
    NORM_TILES: tl.constexpr,  # of 128 columns of fp8_out, the first, of which there is a norm; 0: of none
    NORM_GROUPS: tl.constexpr,  # NORM_TILES padded to a power of two
    NORM_ROWS: tl.constexpr,  # that are normed at once
    SPLITS: tl.constexpr,
    FP8_SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,  # of a tile, at least num_tokens
    ADD_TOKENS: tl.constexpr,
):
    wait_for_previous()
    program, tiles, fp8_tiles = tl.program_id(0), tl.cdiv(num_rows, 128), tl.cdiv(fp8_rows, 128)
    if program < tiles * SPLITS:
        multiply_tile(
            program % tiles, program // tiles, x, x, matrix, matrix, arrived, parts, out, out, out, num_tokens,
            num_rows, num_rows + 128, depth, x_row, 0, 0, 0, 0, "bf16", False, SPLITS > 1, SPLITS, 1, 128, TOKENS, 64,
            ADD_TOKENS,
        )  # fmt: skip
    else:
        program -= tiles * SPLITS
        whole = multiply_tile(
            program % fp8_tiles, program // fp8_tiles, codes, exponents, weight, weight_exponents, fp8_arrived,
            fp8_parts, fp8_out, fp8_out, fp8_out, num_tokens, fp8_rows, fp8_rows + 128, depth, code_row, token_step,
            block_step, 0, 0, "fp8", False, FP8_SPLITS > 1, FP8_SPLITS, 1, 128, TOKENS, 128, ADD_TOKENS,
        )  # fmt: skip
        if NORM_TILES > 0:  # noqa: SIM102  # a constant, then values
            if whole & (program % fp8_tiles < NORM_TILES):  # noqa: SIM102  # a count that others must not make
                if is_last(fp8_arrived + fp8_tiles, NORM_TILES):
                    for first in range(0, num_tokens, NORM_ROWS):
                        row = first + tl.arange(0, NORM_ROWS).to(tl.int64)
                        norm_rows(
                            row, num_tokens, fp8_out, norm, normed, normed_exponents, normed_scales, NORM_TILES * 128,
                            fp8_rows, normed_token_step, normed_block_step, eps, True, True, NORM_GROUPS,
                        )  # fmt: skip


def linear_pair(
    x_fp8: Fp8Rows, weight: Fp8Weight, x: Tensor, matrix: Tensor | None, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Fp8Rows | None]:
    """`linear_fp8(x_fp8, weight)` bfloat16 [T, N] and `linear_bf16(x, matrix)` float32 [T, M] (or None), to the bit.

    One launch for up to MOST_TOKENS tokens, else (and in deterministic mode) one for each. Up to FEW the launch, with
    one product or two, also makes `rms_norm_fp8` of the first columns of the former, as many as `norm` float32 has;
    else that is None.
    Raises ValueError for shapes that do not fit.
    """
    num_tokens, (fp8_rows, depth) = len(x), weight.codes.shape
    if not 0 < num_tokens <= (FEW if matrix is None else MOST_TOKENS) or is_deterministic():
        return gemm.linear_fp8(x_fp8, weight), None if matrix is None else gemm.linear_bf16(x, matrix), None
    gemm.check_fp8(x_fp8, weight)
    if matrix is None:
        matrix = x[:0]  # has no programs
    gemm.check_bf16(x, matrix)
    num_rows = len(matrix)
    if x_fp8.codes.shape != x.shape:
        raise ValueError(f"linear_pair: x_fp8 is {list(x_fp8.codes.shape)}, x {list(x.shape)}; expected one shape")
    tokens, splits, num_warps, num_stages, _ = gemm.tiles_for(num_tokens, max(1, num_rows), depth, "bf16")
    fp8_splits = gemm.tiles_for(num_tokens, fp8_rows, depth, "fp8").splits
    out = torch.empty(num_tokens, num_rows, device=x.device, dtype=torch.float32)
    fp8_out = torch.empty(num_tokens, fp8_rows, device=x.device, dtype=torch.bfloat16)
    normed = empty_rows(num_tokens, len(norm), x.device) if num_tokens <= FEW else None
    norm_tiles = 0 if normed is None else len(norm) // GROUP
    tiles, fp8_tiles = triton.cdiv(num_rows, gemm.TILE_ROWS), triton.cdiv(fp8_rows, gemm.TILE_ROWS)
    arrived = counters(x.device, tiles + fp8_tiles + 1)
    _pair[(tiles * splits + fp8_tiles * fp8_splits,)](
        x,
        matrix,
        arrived,
        torch.empty(splits, num_tokens, num_rows, device=x.device, dtype=torch.float32),
        out,
        x_fp8.codes,
        x_fp8.exponents,
        weight.codes,
        weight.exponents,
        arrived[tiles:],
        torch.empty(fp8_splits, num_tokens, fp8_rows, device=x.device, dtype=torch.float32),
        fp8_out,
        num_tokens,
        depth,
        num_rows,
        fp8_rows,
        x.stride(0),
        x_fp8.codes.stride(0),
        *x_fp8.exponents.stride(),
        norm,
        *((norm,) * 3 if normed is None else (normed.codes, normed.exponents, normed.scales_to_write)),
        *((0, 0) if normed is None else normed.exponents.stride()),
        eps,
        NORM_TILES=norm_tiles,
        NORM_GROUPS=triton.next_power_of_2(norm_tiles),
        NORM_ROWS=NORM_ROWS,
        SPLITS=splits,
        FP8_SPLITS=fp8_splits,
        TOKENS=tokens,
        ADD_TOKENS=gemm.ADD_TOKENS,
        num_warps=num_warps,
        num_stages=num_stages,
        launch_pdl=launches_early(x.device),
    )
    return fp8_out, out if num_rows else None, normed
