"""Row formats: byte counts, exactness, masked reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsv4_kernels.kv_store import Format, RowFormat, decode, encode, load, store

VECTORS = Path(__file__).parents[1] / "golden" / "tiny-random" / "quant_vectors.safetensors"


def test_row_bytes_of_the_released_models() -> None:
    assert RowFormat(Format.KV_FP8, 512, 64).row_bytes == 584
    assert RowFormat(Format.KV_FP8, 512, 64).plane_bytes == (576, 8)
    assert RowFormat(Format.INDEX_FP4, 128).row_bytes == 68
    assert RowFormat(Format.INDEX_FP8, 128).row_bytes == 132
    assert RowFormat(Format.KV_FP8, 128, 64).row_bytes == 64 + 128 + 8
    assert RowFormat(Format.F32, 64).row_bytes == 256


def test_kv_rows_hold_the_official_rounding_bit_for_bit() -> None:
    vectors = load_file(VECTORS)
    row_format = RowFormat(Format.KV_FP8, 512, 64)
    data, scale = encode(vectors["kv.x"], row_format)
    assert torch.equal(data[:, :448], vectors["kv.q_bytes"])
    assert torch.equal(scale[:, :7], vectors["kv.scale_e8m0"])
    assert torch.equal(scale[:, 7], torch.zeros(len(scale), dtype=torch.uint8))
    assert torch.equal(decode((data, scale), row_format), vectors["kv.out"])


def test_index_rows_hold_the_official_rounding_bit_for_bit() -> None:
    vectors = load_file(VECTORS)
    row_format = RowFormat(Format.INDEX_FP4, 128)
    planes = encode(vectors["idx.fp4_in"], row_format)
    assert torch.equal(planes[0], vectors["idx.fp4_packed"])
    assert torch.equal(planes[1], vectors["idx.scale_e8m0"])
    assert torch.equal(decode(planes, row_format), vectors["idx.out"])


def test_fp8_index_rows_are_within_half_a_step() -> None:
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    row_format = RowFormat(Format.INDEX_FP8, 128)
    error = (decode(encode(x, row_format), row_format).float() - x).abs()
    assert (error <= x.abs() * 2**-4 + x.abs().amax(1, keepdim=True) * 2**-9).all()


@pytest.mark.parametrize(
    "row_format", [RowFormat(Format.F32, 24), RowFormat(Format.KV_FP8, 96, 32), RowFormat(Format.INDEX_FP4, 32)]
)
def test_store_writes_only_its_rows_and_minus_one_reads_the_last(row_format: RowFormat) -> None:
    poison = 255
    planes = tuple(torch.full((10, width), poison, dtype=torch.uint8) for width in row_format.plane_bytes)
    for plane in planes:
        plane[-1] = 0
    x = torch.randn(3, row_format.dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = torch.tensor([7, 0, 4])
    store(planes, rows, encode(x, row_format))
    untouched = [row for row in range(9) if row not in rows.tolist()]
    assert all((plane[untouched] == poison).all() for plane in planes)
    read = load(planes, torch.tensor([[7, -1], [4, 0]]), row_format)
    expected = decode(encode(x, row_format), row_format)
    assert torch.equal(read[0, 0], expected[0])
    assert torch.equal(read[1], torch.stack([expected[2], expected[1]]))
    assert torch.equal(read[0, 1], torch.zeros_like(expected[0]))


@pytest.mark.parametrize("name", list(Format))
def test_zero_rows(name: Format) -> None:
    row_format = RowFormat(name, 128, 64 if name is Format.KV_FP8 else 0)
    assert decode(encode(torch.empty(0, 128), row_format), row_format).shape == (0, 128)
