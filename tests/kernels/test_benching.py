"""What benchmarks compute from a time: rates, the floor, the line."""

import math

import pytest
import torch

from dsv4_kernels.benching import Measured, num_copies, relative_error


def test_the_floor_is_the_larger_of_bytes_and_operations():
    memory = Measured(us=10.0, moved_bytes=16_000_000, flops=10**9, copy_rate=3.2e12, matmul_rate=8e14)
    assert memory.gb_per_s == pytest.approx(1600.0)
    assert memory.tflop_per_s == pytest.approx(100.0)
    assert memory.times_floor == pytest.approx(2.0)
    compute = Measured(us=10.0, moved_bytes=16_000_000, flops=6 * 10**9, copy_rate=3.2e12, matmul_rate=8e14)
    assert compute.times_floor == pytest.approx(10 / 7.5)


def test_inputs_rotate_through_more_than_a_cache():
    assert num_copies(1 << 30) == 1
    assert num_copies(100 << 20) * (100 << 20) >= 512 << 20
    assert num_copies(0) == num_copies(1) == 64


def test_relative_error_is_the_norm_of_the_difference_over_that_of_the_expected():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert math.isnan(relative_error(torch.tensor([torch.nan, 4.0]), expected))
    with pytest.raises(ValueError, match=r"found is \[1\], expected \[2\]"):
        relative_error(expected[:1], expected)
