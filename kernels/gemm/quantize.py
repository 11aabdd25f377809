"""E4M3 activations as the products read them: the exponents of a group are neighbours over the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import capability
from dsv4_kernels.deterministic import is_deterministic
from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows
from dsv4_kernels.quant.triton import launch

LEAST_TOKENS = 48  # of a product that the library does
MULTIPLE = 4  # of tokens: the library wants columns of scales at multiples of 16 bytes


def is_for_library(num_tokens: int, device: torch.device) -> bool:
    """Whether the library multiplies so many tokens with a weight."""
    is_enough = num_tokens >= LEAST_TOKENS and num_tokens % MULTIPLE == 0
    return is_enough and not is_deterministic() and capability.is_hopper(device)


def empty_rows(num_rows: int, depth: int, device: torch.device, scales: bool = False) -> Fp8Rows:
    """Rows to be written. `scales`: who writes them also writes the float32 scales that the library's product wants."""
    codes = torch.empty(num_rows, depth, device=device, dtype=torch.float8_e4m3fn)
    exponents = torch.empty(depth // GROUP, num_rows, device=device, dtype=torch.uint8).t()
    if not (scales and is_for_library(num_rows, device)):
        return Fp8Rows(codes, exponents)
    return Fp8Rows(codes, exponents, torch.empty(exponents.t().shape, device=device, dtype=torch.float32).t())


def quantize_rows(x: Tensor) -> Fp8Rows:
    """x bfloat16 or float32 [T, K] to E4M3 per 128 along K, bit-equal to `quantize_fp8(x, 128)`.

    One launch, to be shared by all products over x. x may be some columns of a larger matrix.
    Raises ValueError when K is no multiple of 128, or a row's values are not neighbours.
    """
    if x.shape[1] % GROUP:
        raise ValueError(f"quantize_rows: x is {list(x.shape)}; expected K a multiple of {GROUP}")
    rows = empty_rows(*x.shape, x.device)
    launch(x, rows.codes, rows.exponents, GROUP, fp4=False)
    return rows
