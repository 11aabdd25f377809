"""Rotations in Triton against float64, to the end of the longest context."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel

from dsv4_kernels.rope import rope_frequencies, rope_table
from dsv4_kernels.rope.triton import rope_tables

POSITIONS = [-1, 0, 1, 3, 127, 128, 4095, 65_535, 105_615, 1_000_003, 1_048_575]
YARN = 160_000.0, (16.0, 65_536, 32.0, 1.0)


@pytest.mark.parametrize(("theta", "yarn"), [(10_000.0, None), YARN])
def test_rotations_are_those_of_the_float32_angle_rounded_once(theta, yarn):
    frequencies = rope_frequencies(64, theta, yarn).float()
    positions = torch.tensor(POSITIONS, dtype=torch.int32)
    found = torch.view_as_real(rope_tables(positions, frequencies)[0])
    angles = (positions.float().unsqueeze(1) * frequencies).double()
    expected = torch.stack([angles.cos(), angles.sin()], -1)
    # Half a unit in the last place of a number up to 1, and what float64 itself is off by.
    assert (found.double() - expected).abs().max() < 2**-25 + 1e-9
    assert (found - torch.view_as_real(rope_table(positions, frequencies))).abs().max() < 1.5e-7


def test_positions_are_rounded_down_for_each_ratio():
    frequencies = rope_frequencies(64, *YARN).float()
    positions = torch.arange(-3, 300, dtype=torch.int32)
    tables = rope_tables(positions, frequencies, (1, 4, 128))
    for table, ratio in zip(tables, (1, 4, 128), strict=True):
        first = torch.div(positions, ratio, rounding_mode="floor") * ratio
        assert torch.equal(table, rope_tables(first.int(), frequencies)[0])


def test_no_rows_and_what_does_not_fit():
    frequencies = rope_frequencies(64, *YARN).float()
    none = torch.zeros(0, dtype=torch.int32)
    assert rope_tables(none, frequencies, (1, 4)).shape == (2, 0, 32)
    with pytest.raises(ValueError, match=r"positions are torch\.int64"):
        rope_tables(none.long(), frequencies)
    with pytest.raises(ValueError, match=r"ratios are \(1, 3\)"):
        rope_tables(none, frequencies, (1, 3))
