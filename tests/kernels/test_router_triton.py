"""The Triton router against the reference, by the interpreter on the CPU."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.poison import poisoned  # noqa: F401

from dsv4_kernels.cases import Shapes
from dsv4_kernels.router import reference, triton
from dsv4_kernels.router.cases import Case

BOUND = 1e-5  # relative norm of the weights
SIZES = [(0, 128, 5, 3), (1, 256, 12, 2), (7, 384, 5, 3), (3, 4100, 384, 6), (70, 320, 130, 6)]
pytestmark = pytest.mark.usefixtures("poisoned")


def make(num_tokens, hidden, num_experts, top_k, x_dtype=torch.bfloat16, weight_dtype=torch.bfloat16):
    shapes = Shapes(hidden, *(1,) * 6, num_experts, top_k, 1, 4, 1000, 2.5, 1.0)
    inputs = Case("random", num_tokens, shapes).make(3, x_dtype)
    inputs["gate_weight"] = inputs["gate_weight"].to(weight_dtype)
    return inputs


def expected(inputs):
    return reference.route(**(inputs | {"gate_weight": inputs["gate_weight"].float()}))


def assert_same(found, others):
    (weights, ids), (other_weights, other_ids) = found, others
    assert weights.dtype == other_weights.dtype
    assert torch.equal(ids, other_ids)
    assert (weights.double() - other_weights.double()).norm() <= BOUND * other_weights.double().norm()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_reference(size, x_dtype, weight_dtype):
    inputs = make(*size, x_dtype, weight_dtype)
    assert_same(triton.route(**inputs), expected(inputs))


@pytest.mark.parametrize("bias", [True, False])
def test_hash_layers_take_the_experts_of_the_token(bias):
    inputs = make(9, 256, 12, 4)
    inputs["tid2eid"] = torch.rand(1000, 12, generator=torch.Generator().manual_seed(4)).argsort(1)[:, :4].contiguous()
    inputs["bias"] = inputs["bias"] if bias else None  # not used either way
    found = triton.route(**inputs)
    assert torch.equal(found[1], inputs["tid2eid"][inputs["token_ids"]])
    assert_same(found, expected(inputs))


def test_without_a_bias():
    inputs = make(9, 256, 12, 4) | {"bias": None}
    assert_same(triton.route(**inputs), expected(inputs))


def test_the_lower_id_wins_a_tie():
    inputs = make(3, 128, 20, 4)
    inputs["gate_weight"][:] = inputs["gate_weight"][:1]
    inputs["bias"][:] = -3.0  # negative sums, in reverse order of their bits
    inputs["bias"][[2, 17]] = -1.0
    assert triton.route(**inputs)[1].tolist() == [[2, 17, 0, 1]] * 3


def test_scores_over_the_whole_range_of_logits():
    """The series of the logarithm and both ends of softplus: one expert each, logits -90 to 90."""
    logits = torch.cat([torch.linspace(-90, 90, 120), torch.linspace(-1, 1, 8)])
    weight = torch.zeros(128, 128)
    weight[:, 0] = logits
    inputs = {
        "x": torch.nn.functional.pad(torch.ones(1, 1), (0, 127)), "gate_weight": weight, "bias": None, "tid2eid": None,
        "token_ids": torch.zeros(1, dtype=torch.int64), "top_k": 128, "scale": 1.0,
    }  # fmt: skip
    weights, ids = triton.route(**inputs)
    scores = torch.nn.functional.softplus(logits.double()).sqrt()
    assert torch.equal(ids, torch.sort(scores, descending=True, stable=True).indices[None])
    exact = (scores / scores.sum())[ids[0]]
    assert ((weights[0] - exact).abs() <= 5e-6 * exact).all()


def test_padding_rows_get_no_expert_and_are_not_read():
    inputs = make(5, 256, 12, 3)
    clean = triton.route(**inputs)
    positions = torch.tensor([4, -1, 0, 7, -1], dtype=torch.int32)
    inputs["x"][[1, 4]] = torch.nan
    inputs["token_ids"][[1, 4]] = 1 << 60
    for table in (None, torch.arange(3000).view(1000, 3) % 12):
        weights, ids = triton.route(**(inputs | {"tid2eid": table}), positions=positions)
        assert (ids[[1, 4]] == -1).all()
        assert not weights[[1, 4]].any()
        assert (ids[[0, 2, 3]] >= 0).all()
        if table is None:
            assert torch.equal(weights[[0, 2, 3]], clean[0][[0, 2, 3]])
            assert torch.equal(ids[[0, 2, 3]], clean[1][[0, 2, 3]])


def test_nan_in_one_token_stays_there_and_its_experts_exist():
    inputs = make(3, 128, 12, 4)
    clean = triton.route(**inputs)
    inputs["x"][1, 5] = torch.nan
    weights, ids = triton.route(**inputs)
    assert weights[1].isnan().all()
    assert torch.equal(ids[1], expected(inputs)[1][1])
    assert torch.equal(weights[[0, 2]], clean[0][[0, 2]])


def test_a_token_has_the_same_bits_alone_and_in_a_batch_of_the_same_tiles():
    inputs = make(20, 600, 12, 4)
    weights, ids = triton.route(**inputs)
    alone = inputs | {key: inputs[key][13:14].contiguous() for key in ("x", "token_ids")}
    assert torch.equal(triton.route(**alone)[0], weights[13:14])
    assert torch.equal(triton.route(**alone)[1], ids[13:14])


def test_wrong_arguments_are_refused():
    inputs = make(2, 128, 5, 3)
    with pytest.raises(ValueError, match=r"x is \[2, 128\], gate_weight \[5, 128\], top_k 6"):
        triton.route(**(inputs | {"top_k": 6}))
    with pytest.raises(ValueError, match="x has strides"):
        triton.route(**(inputs | {"x": torch.zeros(128, 2, dtype=torch.bfloat16).t()}))
