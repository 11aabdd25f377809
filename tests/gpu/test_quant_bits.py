"""The Triton quantisation on a real GPU: the bits of the reference on the CPU."""

import pytest
import torch

from dsv4_kernels.cases import PRO
from dsv4_kernels.quant import reference, triton
from dsv4_kernels.quant.cases import Case, adversarial, all_bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "group"), [("fp8", 128), ("fp8", 64), ("fp4", 32)])
def test_bits(name, group, dtype):
    integer = torch.int16 if dtype is torch.bfloat16 else torch.int32
    for x in (
        Case("pro", 300, PRO).make(5, dtype)["x"],
        adversarial(group).to(dtype),
        all_bfloat16(448.0 if name == "fp8" else 6.0, group).to(dtype),
    ):
        found = getattr(triton, f"quantize_{name}")(x.cuda(), group)
        for one, other in zip(found, getattr(reference, f"quantize_{name}")(x, group), strict=True):
            assert torch.equal(one.cpu().view(torch.uint8), other.view(torch.uint8))
        rounded = getattr(triton, f"fake_quantize_{name}")(x.cuda(), group).cpu()
        assert torch.equal(rounded.view(integer), getattr(reference, f"fake_quantize_{name}")(x, group).view(integer))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_and_stays_in_its_group(bad):
    x = torch.randn(3, 512, device="cuda")
    x[1, 200] = bad
    for name, group in (("fp8", 128), ("fp4", 32)):
        rounded = getattr(triton, f"fake_quantize_{name}")(x, group)
        groups = rounded.unflatten(1, (-1, group)).isfinite().all(2)
        assert (~groups).nonzero().tolist() == [[1, 200 // group]]
        assert getattr(triton, f"quantize_{name}")(x, group)[1][1, 200 // group] == 255
