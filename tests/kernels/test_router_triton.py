"""The Triton router against the reference, by the interpreter on the CPU."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.poison import poisoned  # noqa: F401

from dsv4_kernels.arrival import counters
from dsv4_kernels.cases import Shapes
from dsv4_kernels.gemm import library
from dsv4_kernels.mega_moe.tiles import empty_tiles, make_tiles
from dsv4_kernels.quant import fake_quantize_fp8
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
    """Of the reference, a token's experts in the order of their ids."""
    weights, ids = reference.route(**(inputs | {"gate_weight": inputs["gate_weight"].float()}))
    ids, order = ids.sort(dim=1)
    return weights.gather(1, order), ids


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


def test_logits_of_the_library_choose_the_same(monkeypatch):
    inputs = make(70, 2304, 130, 6)
    rounded = torch.empty_like(inputs["x"])
    monkeypatch.setattr(library, "is_for_library", lambda x: True)
    monkeypatch.setattr(library, "linear_bf16", lambda x, weight: x.float() @ weight.float().t())
    tiles = empty_tiles(70 * 6, 130, 16, torch.device("cpu"))
    assert_same(triton.route(**inputs, tiles=tiles, rounded=rounded), expected(inputs))
    assert torch.equal(rounded, fake_quantize_fp8(inputs["x"], 128))
    assert not counters(rounded.device, 1).any()


@pytest.mark.parametrize("bias", [True, False])
def test_hash_layers_take_the_experts_of_the_token(bias):
    inputs = make(9, 256, 12, 4)
    inputs["tid2eid"] = torch.rand(1000, 12, generator=torch.Generator().manual_seed(4)).argsort(1)[:, :4].contiguous()
    inputs["bias"] = inputs["bias"] if bias else None  # not used either way
    found = triton.route(**inputs)
    assert torch.equal(found[1], inputs["tid2eid"][inputs["token_ids"]].sort(dim=1).values)
    assert_same(found, expected(inputs))


def test_without_a_bias():
    inputs = make(9, 256, 12, 4) | {"bias": None}
    assert_same(triton.route(**inputs), expected(inputs))


def test_the_lower_id_wins_a_tie():
    inputs = make(3, 128, 20, 4)
    inputs["gate_weight"][:] = inputs["gate_weight"][:1]
    inputs["bias"][:] = -3.0  # negative sums, in reverse order of their bits
    inputs["bias"][[2, 17]] = -1.0
    assert triton.route(**inputs)[1].tolist() == [[0, 1, 2, 17]] * 3


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
    assert torch.equal(ids, torch.arange(128)[None])
    exact = (scores / scores.sum())[ids[0]]
    assert ((weights[0] - exact).abs() <= 5e-6 * exact).all()


def test_padding_rows_get_no_expert_and_are_not_read():
    inputs = make(5, 256, 12, 3)
    clean = triton.route(**inputs)
    positions = torch.tensor([4, -1, 0, 7, -1], dtype=torch.int32)
    inputs["x"][[1, 4]] = torch.nan
    inputs["token_ids"][[1, 4]] = 1 << 60
    for table in (None, torch.arange(3000).view(1000, 3) % 12):  # 0 to 11 and over again: not all rows are sorted
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
    narrow = make(2, 96, 5, 3)
    with pytest.raises(ValueError, match=r"x is \[2, 96\]; to round it, D must be a multiple of 128"):
        triton.route(**narrow, rounded=torch.empty_like(narrow["x"]))
    with pytest.raises(ValueError, match="x has strides"):
        triton.route(**(inputs | {"x": torch.zeros(128, 2, dtype=torch.bfloat16).t()}))


@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(1, 1, 1), (5, 3, 12), (70, 6, 40), (90, 6, 16)])
def test_the_tiles_are_those_of_the_chosen_experts(num_tokens, top_k, num_experts):
    """Of few pairs in the same launch, of more than 512 in another."""
    inputs = make(num_tokens, 128, num_experts, top_k)
    positions = torch.arange(num_tokens, dtype=torch.int32)
    positions[3::4] = -1
    tiles = empty_tiles(num_tokens * top_k, num_experts, 16, torch.device("cpu"))
    _, ids = triton.route(**inputs, positions=positions, tiles=tiles)
    expected = make_tiles(ids, num_experts, 16)
    assert torch.equal(tiles.experts, expected.experts)
    used = expected.experts >= 0
    assert torch.equal(tiles.firsts[used], expected.firsts[used])
    assert torch.equal(tiles.counts[used], expected.counts[used])
    assert torch.equal(tiles.pairs[: (ids >= 0).sum()], expected.pairs[: (ids >= 0).sum()])


def test_all_tokens_on_one_expert_make_several_tiles_of_it():
    inputs = make(40, 128, 5, 1)
    inputs["bias"] = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0])
    tiles = empty_tiles(40, 5, 16, torch.device("cpu"))
    triton.route(**inputs, tiles=tiles)
    assert tiles.experts.tolist() == [2, 2, 2, *[-1] * (len(tiles.experts) - 3)]
    assert tiles.firsts[:3].tolist() == [0, 16, 32]
    assert tiles.counts[:3].tolist() == [16, 16, 8]
    assert tiles.pairs.tolist() == list(range(40))


@pytest.mark.parametrize(("num_tokens", "hidden"), [(3, 128), (5, 1152), (66, 384)])
def test_x_is_rounded_as_the_products_take_it(num_tokens, hidden):
    inputs = make(num_tokens, hidden, 12, 3)
    positions = torch.arange(num_tokens, dtype=torch.int32)
    positions[1] = -1
    rounded = torch.empty_like(inputs["x"])
    triton.route(**inputs, positions=positions, rounded=rounded)
    real = positions >= 0
    assert torch.equal(rounded[real], fake_quantize_fp8(inputs["x"], 128)[real])
    assert rounded[1].isnan().all()  # as poisoned: nothing was written


def test_the_counters_are_zero_again():
    inputs = make(20, 600, 12, 4)
    first = triton.route(**inputs)
    assert not counters(torch.device("cpu"), 1).any()
    assert torch.equal(triton.route(**inputs)[0], first[0])
