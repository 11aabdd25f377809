"""The shared expert in Triton: two FP8 products, and between them SwiGLU whose result is quantised in its launch.

Equal to `reference.shared_expert` at every rounding point. Its weights are E4M3 with a scale per 128 x 128, so it takes
the products of `gemm`, not those of the routed experts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.quantize import empty_rows
from dsv4_kernels.gemm.triton import Tiles, linear_fp8
from dsv4_kernels.quant.device import inverse_power_of_two, scale_exponent

BLOCK_GROUPS = 4  # groups of one program


@triton.jit(do_not_specialize=["group_step"])  # the number of rows
def _swiglu(
    gate_up,  # bf16 [rows, 2 * width], gate first
    codes,  # e4m3 [rows, width]
    exponents,  # uint8 [rows, width / 128], strides row_step and group_step
    width,
    row_step,
    group_step,
    limit,
    GROUPS: tl.constexpr,
):
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.where(gate > limit, limit, gate)  # and not minimum, which drops NaN
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    values = (gate / (1.0 + tl.exp(-gate)) * up).to(tl.bfloat16).to(tl.float32)
    exponent = scale_exponent(values, 1, False)
    values = values * inverse_power_of_two(exponent)[:, None]
    tl.store(codes + row * width + column, values.to(tl.float8e4nv), mask=inside)
    at = exponents + row * row_step + group * group_step
    tl.store(at, exponent.to(tl.uint8), mask=group * 128 < width)


def swiglu_fp8(gate_up: Tensor, limit: float) -> Fp8Rows:
    """SwiGLU with clamp of gate_up bfloat16 [T, 2I], contiguous, gate first -> E4M3 rows [T, I]; I a multiple of 128.

    Raises ValueError for other shapes.
    """
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.shape[1] % (2 * GROUP) or not gate_up.is_contiguous():
        raise ValueError(
            f"swiglu_fp8: gate_up is {list(gate_up.shape)} with strides {gate_up.stride()}; expected contiguous "
            f"[T, 2I], I a multiple of {GROUP}"
        )
    rows = empty_rows(num_rows, width, gate_up.device)
    if num_rows:
        _swiglu[(num_rows, triton.cdiv(width, GROUP * BLOCK_GROUPS))](
            gate_up,
            rows.codes,
            rows.exponents,
            width,
            *rows.exponents.stride(),
            limit,
            GROUPS=BLOCK_GROUPS,
            num_warps=4,
            launch_pdl=launches_early(gate_up.device),
        )
    return rows


def shared_expert(x: Fp8Rows, w13: Fp8Weight, w2: Fp8Weight, *, limit: float, tiles: Tiles | None = None) -> Tensor:
    """w2 swiglu(w13 x) -> bfloat16 [T, D]: `reference.shared_expert` with `quantize` of x's values.

    Args:
        x: [T, D] as `quantize_rows` gives it; w13: [2I, D], gate (w1) rows first; w2: [D, I].
        limit: swiglu clamp. tiles: of both products, so that a row has the same bits in any batch.
    """
    return linear_fp8(swiglu_fp8(linear_fp8(x, w13, tiles=tiles), limit), w2, tiles=tiles)
