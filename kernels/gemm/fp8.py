"""E4M3 matrices whose scales are powers of two by construction: they are stored as exponents, never as floats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

GROUP = 128  # values along K that share a scale: of a row, or of 128 rows of a weight


@dataclass(frozen=True)
class Fp8Rows:
    """Activations quantised per 128 along K.

    codes: float8_e4m3fn [T, K]; exponents: uint8 [T, K / 128], E8M0: the scale is 2^(byte - 127). Equal to
    `quantize_fp8(x, 128)`; the exponents may lie column by column.
    scales: the scales as float32, laid out like the exponents; None where whoever made the rows left them out.
    """

    codes: Tensor
    exponents: Tensor
    scales: Tensor | None = None

    @property
    def scales_to_write(self) -> Tensor:
        """What kernels take that write scales: the exponents stand for none."""
        return self.exponents if self.scales is None else self.scales

    def __post_init__(self) -> None:
        _check("Fp8Rows", self.codes, self.exponents, 1)


@dataclass(frozen=True)
class Fp8Weight:
    """A weight with one scale per block of 128 x 128.

    codes: float8_e4m3fn [N, K], row by row; exponents: uint8 [ceil(N / 128), K / 128], E8M0: the scale is
    2^(byte - 127), and byte 0 counts as zero (2^-127 is below the normal float32 range). A kernel that repacks bytes
    cannot meet a mantissa: that gave others NaN.
    """

    codes: Tensor
    exponents: Tensor

    def __post_init__(self) -> None:
        _check("Fp8Weight", self.codes, self.exponents, GROUP)

    @classmethod
    def from_checkpoint(cls, codes: Tensor, scale: Tensor) -> Fp8Weight:
        """From E8M0 scales (float8_e8m0fnu or uint8) or from float32 ones that are powers of two.

        Reads the scales back to the host: for loading, not for a step. Raises ValueError for any other scale.
        """
        if scale.dtype is torch.float32:
            exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
            wrong = (scale.view(torch.int32) & 0x7FFFFF).ne(0) | scale.le(0)
        else:
            exponents = scale.view(torch.uint8)
            wrong = torch.zeros_like(exponents, dtype=torch.bool)
        wrong |= exponents == 255
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"Fp8Weight: the scale of block ({row}, {column}) is {scale.float()[row, column].item()}; "
                "allowed are powers of two from 2^-126 to 2^127"
            )
        return cls(codes.contiguous(), exponents.contiguous())

    @classmethod
    def stack(cls, weights: Sequence[Fp8Weight]) -> Fp8Weight:
        """All rows as one weight, for one product over their common input. Raises ValueError if that cuts blocks."""
        for number, weight in enumerate(weights[:-1]):
            if weight.codes.shape[0] % GROUP:
                raise ValueError(
                    f"Fp8Weight.stack: weight {number} has {weight.codes.shape[0]} rows; expected a multiple of {GROUP}"
                )
        codes = torch.cat([weight.codes.view(torch.uint8) for weight in weights]).view(torch.float8_e4m3fn)
        return cls(codes, torch.cat([weight.exponents for weight in weights]))

    @cached_property
    def float_scales(self) -> Tensor:
        """Scales as float32 [K / 128 + padding, ceil(N / 128)], columns of whole 16 bytes, for the library's product.

        The first call allocates; make it before a CUDA graph is captured.
        """
        padded = torch.nn.functional.pad(self.exponents, (0, -self.exponents.shape[1] % 4))
        return (padded.int() << 23).view(torch.float32).t()

    def first_rows(self, num_rows: int) -> Fp8Weight:
        """The first rows of a stack, no copy."""
        return Fp8Weight(self.codes[:num_rows], self.exponents[: -(-num_rows // GROUP)])


def _check(name: str, codes: Tensor, exponents: Tensor, rows_per_scale: int) -> None:
    if codes.dtype is not torch.float8_e4m3fn or exponents.dtype is not torch.uint8:
        raise ValueError(
            f"{name}: codes are {codes.dtype} and exponents {exponents.dtype}; expected torch.float8_e4m3fn and "
            "torch.uint8 (scales travel as E8M0 bytes, so that each is a power of two)"
        )
    num_rows, depth = codes.shape
    expected = [-(-num_rows // rows_per_scale), depth // GROUP]
    if depth % GROUP or list(exponents.shape) != expected:
        raise ValueError(
            f"{name}: codes are {list(codes.shape)} and exponents {list(exponents.shape)}; expected K a multiple of "
            f"{GROUP} and exponents [{'ceil(N / 128)' if rows_per_scale > 1 else 'T'}, K / 128]"
        )
    if codes.stride(1) != 1:
        raise ValueError(f"{name}: codes have strides {codes.stride()}; expected rows of neighbouring values")
