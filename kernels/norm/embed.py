"""Two norms in one launch: of embeddings, and of other rows of their width, both quantised to E4M3."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows
from dsv4_kernels.gemm.quantize import empty_rows
from dsv4_kernels.norm.device import norm_row


@triton.jit(do_not_specialize=["group_step", "other_group_step"])
def _two_norms(
    table,  # [ids, dim]
    ids,  # int64 [tokens]
    x,  # [rows, dim], of the table's dtype
    weight,
    other_weight,
    out,  # E4M3 [tokens, dim]
    other_out,  # E4M3 [rows, dim]
    exponents,
    other_exponents,
    scales,  # of `store_scales`
    other_scales,
    num_tokens,
    dim,
    row_step,
    group_step,
    other_row_step,
    other_group_step,
    eps,
    GROUPS: tl.constexpr,
):
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    if row < num_tokens:
        at = table + (tl.load(ids + row) - row) * dim
        norm_row(
            row, at, weight, out, exponents, scales, dim, dim, row_step, group_step, eps, True, True, GROUPS
        )  # fmt: skip
    else:
        norm_row(
            row - num_tokens, x, other_weight, other_out, other_exponents, other_scales, dim, dim, other_row_step,
            other_group_step, eps, True, True, GROUPS,
        )  # fmt: skip


def embed_and_norm_fp8(
    table: Tensor, ids: Tensor, weight: Tensor, x: Tensor, x_weight: Tensor, eps: float
) -> tuple[Fp8Rows, Fp8Rows]:
    """`rms_norm_fp8` of the rows `ids` int64 [N] of `table` [V, D], and of x [T, D], in one launch.

    Both are contiguous and of one dtype, the weights float32 [D]; D is a multiple of 128. Raises ValueError otherwise.
    """
    (num_tokens,), (num_rows, dim) = ids.shape, x.shape
    if table.dtype != x.dtype or table.shape[1] != dim or not (table.is_contiguous() and x.is_contiguous()):
        raise ValueError(
            f"embed_and_norm_fp8: table {list(table.shape)} {table.dtype}, x {list(x.shape)} {x.dtype}; expected one "
            "width and dtype, contiguous"
        )
    found, other = (empty_rows(num, dim, x.device, scales=True) for num in (num_tokens, num_rows))
    if num_tokens + num_rows:
        groups = triton.next_power_of_2(triton.cdiv(dim, GROUP))
        _two_norms[(num_tokens + num_rows,)](
            table, ids, x, weight, x_weight, found.codes, other.codes, found.exponents, other.exponents,
            found.scales_to_write, other.scales_to_write, num_tokens, dim,
            *found.exponents.stride(), *other.exponents.stride(), eps, GROUPS=groups,
            num_warps=8 if groups > 16 else 4, launch_pdl=launches_early(x.device),
        )  # fmt: skip
    return found, other
