"""RMSNorm in C: float32."""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels import cpu


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor | None:
    """See reference.py. x may be some columns of a larger matrix."""
    if x.dim() < 2 or not cpu.fits(x, *(() if weight is None else (weight,))):
        return None
    row_step, length = x.stride(-2), x.shape[-1]
    if not (x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1)):
        return None
    out = x.new_empty(x.shape)
    cpu.library.dsv4_rms_norm(
        x.data_ptr(),
        row_step,
        0 if weight is None else weight.data_ptr(),
        out.data_ptr(),
        x.shape[:-1].numel(),
        length,
        eps,
    )
    return out


def head_norm(q: Tensor, eps: float) -> Tensor | None:
    """See reference.py."""
    return rms_norm(q, None, eps)
