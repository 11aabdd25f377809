"""The output projection on a GPU against the reference, at the shapes of the released models."""

import pytest
import torch

from dsv4_kernels.benching import relative_error
from dsv4_kernels.cases import DEMO, FLASH, PRO
from dsv4_kernels.gemm.triton import Tiles
from dsv4_kernels.out_proj.bench import by_reference, make
from dsv4_kernels.out_proj.triton import grouped_out_proj

# Relative norm. A low-rank value at the edge of two codes may round either way after another order of sums.
BOUND = 4e-3


@pytest.mark.parametrize(("name", "shapes"), [("pro", PRO), ("flash", FLASH), ("demo", DEMO)])
def test_equals_the_reference(name, shapes):
    o, wo_a, wo_b = make(shapes, 300, 1, "cuda")
    expected = by_reference(o, wo_a, wo_b, shapes.o_groups)
    for num_tokens in (0, 1, 17, 64, 65, 300):
        found = grouped_out_proj(o[:num_tokens], wo_a, wo_b)
        assert (found.shape, found.dtype) == ((num_tokens, shapes.hidden_size), torch.bfloat16)
        assert num_tokens == 0 or relative_error(found, expected[:num_tokens]) <= BOUND, num_tokens


def test_a_row_has_the_same_bits_alone_and_in_a_batch_of_the_same_tiles():
    o, wo_a, wo_b = make(FLASH, 40, 2, "cuda")
    tiles = Tiles(64, 2, 8, 4)
    together = grouped_out_proj(o, wo_a, wo_b, tiles=tiles)
    assert torch.equal(together[21:22], grouped_out_proj(o[21:22], wo_a, wo_b, tiles=tiles))
    assert torch.equal(together, grouped_out_proj(o, wo_a, wo_b, tiles=tiles))
