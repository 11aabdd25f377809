"""RMSNorm in Triton, also with its result quantised to E4M3 for the products that follow; one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows
from dsv4_kernels.gemm.quantize import empty_rows
from dsv4_kernels.norm.device import norm_row


@triton.jit(do_not_specialize=["group_step"])  # the number of rows
def _rms_norm(
    x,  # [rows, dim]
    weight,  # float32 [dim], with HAS_WEIGHT
    out,  # [rows, dim], of x's dtype or E4M3
    exponents,  # uint8 [rows, dim / 128], with QUANTIZE
    scales,  # of `store_scales`, with QUANTIZE
    dim,
    x_row,
    row_step,
    group_step,
    eps,
    HAS_WEIGHT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    GROUPS: tl.constexpr,  # of 128 values, a power of two
):
    wait_for_previous()
    norm_row(
        tl.program_id(0).to(tl.int64), x, weight, out, exponents, scales, dim, x_row, row_step, group_step, eps,
        HAS_WEIGHT, QUANTIZE, GROUPS,
    )  # fmt: skip


def norm_arguments(
    x: Tensor, weight: Tensor | None, eps: float, out: Tensor | Fp8Rows
) -> tuple[list[Tensor | int | float], dict[str, int]]:
    """Arguments of `_rms_norm`, checked, and its constants."""
    dim = x.shape[1]
    if x.stride(1) != 1:
        raise ValueError(
            f"rms_norm: x is {list(x.shape)} with strides {x.stride()}; expected rows of neighbouring values"
        )
    quantize = isinstance(out, Fp8Rows)
    arguments = [
        x,
        x if weight is None else weight,
        *((out.codes, out.exponents, out.scales_to_write) if quantize else (out, out, out)),
        dim,
        x.stride(0),
        *(out.exponents.stride() if quantize else (0, 0)),
        eps,
    ]
    groups = triton.next_power_of_2(triton.cdiv(dim, GROUP))
    return arguments, {"HAS_WEIGHT": weight is not None, "QUANTIZE": quantize, "GROUPS": groups}


def _launch(x: Tensor, weight: Tensor | None, eps: float, out: Tensor | Fp8Rows) -> None:
    arguments, sizes = norm_arguments(x, weight, eps, out)
    if len(x):
        num_warps = 8 if sizes["GROUPS"] > 16 else 4
        _rms_norm[(len(x),)](*arguments, **sizes, num_warps=num_warps, launch_pdl=launches_early(x.device))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`rms_norm` of the reference for x bfloat16 or float32 [T, D], which may be some columns of a larger matrix."""
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    _launch(x, weight, eps, out)
    return out


def rms_norm_fp8(x: Tensor, weight: Tensor | None, eps: float) -> Fp8Rows:
    """`quantize_rows(rms_norm(x, weight, eps))` in one launch; D is a multiple of 128."""
    rows = empty_rows(*x.shape, x.device, scales=True)
    _launch(x, weight, eps, rows)
    return rows
