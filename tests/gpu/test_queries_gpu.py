"""The queries of few rows in one launch, on a GPU at Pro's shapes, against a launch for each of its operations."""

import pytest
import torch

from dsv4_kernels.arrival import counters
from dsv4_kernels.cases import PRO
from dsv4_kernels.compressor.cases import Case
from dsv4_kernels.gemm.cases import INDEX_HEADS, LayerRows, products
from dsv4_kernels.metadata import C4, C128

FLIPPED = 2e-3  # share of elements where float32 sums in another order may decide a rounding
STEPS = (
    Case("one", (8191,), (1,)),
    Case("decodes", (0, 3, 126, 127, 511), (1,) * 5, num_padding=2),
    Case("verifies", (2, 253), (4, 3)),
    Case("chunk", (124,), (8,)),
)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize("ratio", [0, C4, C128])
def test_one_launch_is_a_launch_each_but_for_roundings(ratio, step):
    real, heads = sum(step.counts), PRO.num_attention_heads
    name = "wq_b+index" if ratio == C4 else "wq_b"
    _, weight = next(product for product in products(PRO) if product.name == name).make(1, 3, "cuda")
    results = []
    for run in ("together", "apart", "together"):
        rows = LayerRows(ratio, step, weight, heads, INDEX_HEADS, 1, "cuda")
        made = rows.apart() if run == "apart" else rows.together(rows.norm())
        kept = [each["ring" if ratio == C4 else "state"].nan_to_num(7.0) for each in rows.made]
        planes = [plane for each in rows.made for plane in each["planes"]]
        planes += [*rows.arguments["step_planes"], *rows.arguments["ring_planes"]]
        results.append(([each[:real] for each in made], kept, planes))
    together, apart, again = results
    for one, other in zip(together, again, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))
    for one, other in zip(together[0], apart[0], strict=True):
        assert one.isfinite().all()
        assert (one != other).float().mean() <= FLIPPED
    for one, other in zip(together[1], apart[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(together[2], apart[2], strict=True):
        assert (one != other).float().mean() <= FLIPPED
    assert not counters(made[0].device, heads).any()
