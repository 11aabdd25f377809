"""Logits that may be broken, made fit to be drawn from."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_kernels.dependent import launches_early, wait_for_previous
from dsv4_kernels.sampling.reference import LOWEST

CHUNK = 4096  # tokens that a program looks at


@triton.jit
def _keep_finite(logits, out, wrong, vocab, logits_step, row_step, LOWEST: tl.constexpr, CHUNK: tl.constexpr):
    wait_for_previous()
    row, token = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * logits_step + token, mask=token < vocab, other=0.0)
    is_finite = tl.abs(values) < float("inf")
    tl.store(out + row * row_step + token, tl.where(is_finite, values, LOWEST), mask=token < vocab)
    if tl.sum((~is_finite).to(tl.int32)) > 0:
        tl.store(wrong + row, 1)


def keep_finite(logits: Tensor, out: Tensor, wrong: Tensor) -> None:
    """Copy `logits` float32 [B, V] to the rows of `out`, NaN and infinite values as LOWEST.

    `wrong` int32 [B], zeros, becomes 1 where a row had such a value. Raises ValueError for other shapes, dtypes and
    rows whose values are no neighbours.
    """
    num_rows, vocab = logits.shape
    shapes, dtypes = (tuple(out.shape), tuple(wrong.shape)), {logits.dtype, out.dtype}
    are_rows = logits.stride(1) == out.stride(1) == 1 and wrong.is_contiguous()
    if (
        shapes != ((num_rows, vocab), (num_rows,))
        or dtypes != {torch.float32}
        or wrong.dtype != torch.int32
        or not are_rows
    ):
        raise ValueError(
            f"keep_finite: shapes {shapes} for logits {list(logits.shape)}; dtypes {dtypes}, {wrong.dtype}"
        )
    if num_rows:
        _keep_finite[(num_rows, triton.cdiv(vocab, CHUNK))](
            logits, out, wrong, vocab, logits.stride(0), out.stride(0), LOWEST=LOWEST, CHUNK=CHUNK,
            launch_pdl=launches_early(out.device),
        )  # fmt: skip
