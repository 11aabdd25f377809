"""norm, rope, gemm, out_proj, mhc, router and mega_moe against independent restatements in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_kernels.cases import SMALL
from dsv4_kernels.gemm import cases as gemm_cases
from dsv4_kernels.gemm import linear
from dsv4_kernels.mega_moe import cases as moe_cases
from dsv4_kernels.mega_moe import mega_moe
from dsv4_kernels.mhc import cases as mhc_cases
from dsv4_kernels.mhc import mhc_head, mhc_post, mhc_pre, sinkhorn
from dsv4_kernels.norm import cases as norm_cases
from dsv4_kernels.norm import rms_norm
from dsv4_kernels.out_proj import cases as out_cases
from dsv4_kernels.out_proj import grouped_out_proj
from dsv4_kernels.quant import cases as quant_cases
from dsv4_kernels.quant import dequantize_fp4, dequantize_fp8, fake_quantize_fp8, quantize_fp4, quantize_fp8
from dsv4_kernels.rope import apply_rope, rope_frequencies, rope_table
from dsv4_kernels.rope import cases as rope_cases
from dsv4_kernels.router import cases as router_cases
from dsv4_kernels.router import route
from dsv4_kernels.sampling import cases as sampling_cases
from dsv4_kernels.sampling import sample

BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # relative norm; one bf16 rounding is 2^-9 at most
DTYPES = [torch.float32, torch.bfloat16]


def small(module: Any) -> list[Any]:
    """The cases that a CPU test can afford."""
    return [pytest.param(case, id=case.name) for case in module.CASES if case.name in SMALL]


def assert_close(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert actual.shape == expected.shape
    error, size = (actual.double() - expected).norm(), expected.norm()
    assert error <= bound * size, f"relative error {error / size:.2e}, bound {bound:.2e}"


def quantized(x: Tensor) -> Tensor:
    """E4M3 per 128 through the byte format, float64."""
    return dequantize_fp8(*quantize_fp8(x, 128), 128).double()


ROUNDED = {"bf16": Tensor.double, "fp8": quantized, "fp4": lambda x: dequantize_fp4(*quantize_fp4(x)).double()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", small(norm_cases))
def test_rms_norm(case, dtype):
    inputs = case.make(1, dtype)
    x = inputs["x"].double()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    plain = rms_norm(inputs["x"], None, 1e-6)
    assert plain.dtype == dtype
    assert_close(plain, expected, BOUND[dtype])
    assert_close(rms_norm(**inputs), expected * inputs["weight"].double(), BOUND[dtype])


def test_rms_norm_needs_its_eps():
    x = torch.full((1, 4), 1e-3)
    assert_close(rms_norm(x, None, 1e-6), x.double() / 2e-6**0.5, 1e-6)


def test_yarn_frequencies_of_the_released_models():
    plain = rope_frequencies(64, 160_000.0, None)
    scaled = rope_frequencies(64, 160_000.0, (16.0, 65_536, 32.0, 1.0))
    assert_close(plain, torch.tensor([160_000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64), 1e-12)
    ratio = plain / scaled
    assert torch.equal(ratio[:16], torch.ones(16, dtype=torch.float64))
    assert torch.allclose(ratio[25:], torch.full((7,), 16.0, dtype=torch.float64))
    ramp = (torch.arange(16, 25) - 15) / 10
    assert torch.allclose(1 / ratio[16:25], (ramp / 16 + 1 - ramp).double())


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", small(rope_cases))
def test_rope_rotates_trailing_pairs(case, dtype, inverse):
    inputs = case.make(2, dtype)
    x, angle = inputs["x"].double(), inputs["rotations"].angle().double().unsqueeze(1)
    angle = -angle if inverse else angle
    expected = x.clone()
    start = x.shape[-1] - 2 * angle.shape[-1]
    even, odd = x[..., start::2], x[..., start + 1 :: 2]
    expected[..., start::2] = even * angle.cos() - odd * angle.sin()
    expected[..., start + 1 :: 2] = even * angle.sin() + odd * angle.cos()
    actual = apply_rope(**inputs, inverse=inverse)
    assert actual.dtype == dtype
    assert torch.equal(actual[..., :start], inputs["x"][..., :start])
    assert_close(actual, expected, BOUND[dtype])


def test_rope_table_turns_by_position_times_frequency():
    frequencies = rope_frequencies(8, 10_000.0, None)
    table = rope_table(torch.tensor([0, 3, 1000]), frequencies)
    for row, position in enumerate([0, 3, 1000]):
        for pair, frequency in enumerate(frequencies.tolist()):
            angle = position * frequency
            expected = complex(math.cos(angle), math.sin(angle))
            assert abs(complex(table[row, pair]) - expected) < 1e-4


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", small(gemm_cases))
def test_linear(case, dtype, quantize):
    inputs = case.make(3, dtype)
    x = quantized(inputs["x"]) if quantize else inputs["x"].double()
    expected = x @ inputs["weight"].double().t()
    actual = linear(**inputs, quantize=quantize)
    assert actual.dtype == dtype
    assert_close(actual, expected, BOUND[dtype])
    wide = linear(**inputs, quantize=quantize, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert_close(wide, expected, BOUND[torch.float32])


def test_linear_names_the_mismatch():
    with pytest.raises(ValueError, match=r"x has 5 columns.*K = 6"):
        linear(torch.ones(2, 5), torch.ones(3, 6))


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", small(out_cases))
def test_grouped_out_proj(case, dtype, quantize):
    inputs = case.make(4, dtype)
    o, wo_a = inputs["o"].double(), inputs["wo_a"].double()
    per_group = o.shape[1] // wo_a.shape[0]
    parts = [
        o[:, group * per_group : (group + 1) * per_group].flatten(1) @ wo_a[group].t() for group in range(wo_a.shape[0])
    ]
    low = torch.cat(parts, dim=1).to(dtype)
    expected = (quantized(low) if quantize else low.double()) @ inputs["wo_b"].double().t()
    actual = grouped_out_proj(**inputs, quantize=quantize)
    assert actual.dtype == dtype
    # A value at the edge of two codes may round either way after a float32 or a float64 sum.
    assert_close(actual, expected, 1e-2 if quantize else BOUND[dtype])


def literal_sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    matrix = logits.double().softmax(-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_sinkhorn_equals_the_literal_loop(iters, eps, spread):
    logits = torch.randn(32, 4, 4, generator=torch.Generator().manual_seed(5)) * spread
    expected = literal_sinkhorn(logits, iters, eps)
    assert (sinkhorn(logits, iters, eps).double() - expected).abs().max() < 1e-6
    trained = sinkhorn(logits.clone().requires_grad_(), iters, eps)
    assert (trained.double() - expected).abs().max() < 1e-6


def test_sinkhorn_gradient_equals_that_of_the_literal_loop():
    logits = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64).requires_grad_()
    direction = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (actual,) = torch.autograd.grad((sinkhorn(logits, 20, 1e-6) * direction).sum(), logits)
    (expected,) = torch.autograd.grad((literal_sinkhorn(logits, 20, 1e-6) * direction).sum(), logits)
    assert_close(actual, expected, 1e-9)


def literal_pre(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    streams, fn, base, scale = (inputs[name].double() for name in ("streams", "fn", "base", "scale"))
    count = streams.shape[1]
    flat = streams.flatten(1)
    mixes = (flat / (flat.square().mean(-1, keepdim=True) + inputs["norm_eps"]).sqrt()) @ fn.t()
    pre = (mixes[:, :count] * scale[0] + base[:count]).sigmoid() + inputs["hc_eps"]
    post = 2 * (mixes[:, count : 2 * count] * scale[count] + base[count : 2 * count]).sigmoid()
    logits = (mixes[:, 2 * count :] * scale[-1] + base[2 * count :]).view(-1, count, count)
    comb = literal_sinkhorn(logits, inputs["sinkhorn_iters"], inputs["hc_eps"])
    return torch.einsum("ti,tid->td", pre, streams), post, comb


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", small(mhc_cases))
def test_mhc_pre_and_post(case, dtype):
    inputs = case.make(8, dtype)
    merged, post, comb = mhc_pre(**inputs)
    expected_merged, expected_post, expected_comb = literal_pre(inputs)
    assert (merged.dtype, post.dtype, comb.dtype) == (dtype, torch.float32, torch.float32)
    assert_close(merged, expected_merged, BOUND[dtype])
    assert_close(post, expected_post, 1e-6)
    assert_close(comb, expected_comb, 2e-6)

    streams, output = inputs["streams"], inputs["streams"][:, 0] * 0.7
    mixed = mhc_post(output, streams, post, comb)
    assert mixed.dtype == dtype
    expected = torch.einsum("tij,tid->tjd", comb.double(), streams.double())
    expected += post.double().unsqueeze(2) * output.double().unsqueeze(1)
    assert_close(mixed, expected, BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", small(mhc_cases))
def test_mhc_head(case, dtype):
    inputs = case.make(9, dtype)
    streams = inputs["streams"]
    count = streams.shape[1]
    fn, base, scale = inputs["fn"][:count], inputs["base"][:count], inputs["scale"][:1]
    flat = streams.double().flatten(1)
    mixes = (flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ fn.double().t()
    weights = (mixes * scale.double() + base.double()).sigmoid() + 1e-2
    expected = torch.einsum("ti,tid->td", weights, streams.double())
    actual = mhc_head(streams, fn, base, scale, hc_eps=1e-2, norm_eps=1e-6)
    assert actual.dtype == dtype
    assert_close(actual, expected, BOUND[dtype])


def literal_scores(inputs: dict[str, Any]) -> Tensor:
    product = inputs["x"].double() @ inputs["gate_weight"].double().t()
    return (1 + product.exp()).log().sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", small(router_cases))
def test_route_by_score(case, dtype):
    inputs = case.make(10, dtype)
    weights, expert_ids = route(**inputs)
    assert weights.dtype == torch.float32
    scores = literal_scores(inputs)
    biased = (scores + inputs["bias"].double()).tolist()
    for row, chosen in zip(biased, expert_ids.tolist(), strict=True):
        assert chosen == sorted(range(len(row)), key=lambda expert: -row[expert])[: inputs["top_k"]]
    picked = scores.gather(1, expert_ids)
    assert_close(weights, picked / picked.sum(1, keepdim=True) * inputs["scale"], 1e-6)


@pytest.mark.parametrize("case", small(router_cases))
def test_route_by_token(case):
    inputs = case.make(11)
    num_experts, top_k = inputs["gate_weight"].shape[0], inputs["top_k"]
    table = torch.rand(case.shapes.vocab_size, num_experts, generator=torch.Generator().manual_seed(1))
    inputs |= {"tid2eid": table.argsort(1)[:, :top_k], "bias": None}
    weights, expert_ids = route(**inputs)
    assert torch.equal(expert_ids, inputs["tid2eid"][inputs["token_ids"]])
    picked = literal_scores(inputs).gather(1, expert_ids)
    assert_close(weights, picked / picked.sum(1, keepdim=True) * inputs["scale"], 1e-6)


def test_equal_scores_choose_the_lowest_expert_ids():
    x = torch.ones(3, 4)
    for num_experts in (6, 384):
        _, expert_ids = route(
            x,
            torch.ones(num_experts, 4),
            bias=torch.zeros(num_experts),
            tid2eid=None,
            token_ids=torch.zeros(3, dtype=torch.int64),
            top_k=3,
            scale=1.0,
        )
        assert expert_ids.tolist() == [[0, 1, 2]] * 3


def literal_expert(x: Tensor, w13: Tensor, w2: Tensor, weight: float, limit: float, activations: str) -> Tensor:
    """One expert on one row, every rounding point to x.dtype written out."""
    dtype = x.dtype
    width = w2.shape[1]
    rounded = ROUNDED[activations]
    inputs = rounded(x) @ w13.double().t()
    gate, up = inputs.to(dtype).double().split(width)
    hidden = gate.clamp(max=limit) * torch.sigmoid(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weight
    hidden = hidden.to(dtype)
    return (rounded(hidden) @ w2.double().t()).to(dtype).double()


@pytest.mark.parametrize(("activations", "shared"), [("bf16", None), ("bf16", "fp8"), ("fp8", None), ("fp4", None)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", small(moe_cases))
def test_mega_moe(case, dtype, activations, shared):
    inputs = case.make(12, dtype)
    if shared is not None:
        inputs["quantize_shared"] = shared != "bf16"
    shared = shared or ("bf16" if activations == "bf16" else "fp8")  # its weights are FP8
    limit = inputs["limit"]
    expected = torch.zeros(inputs["x"].shape, dtype=torch.float64)
    for token, x in enumerate(inputs["x"]):
        expected[token] = literal_expert(x, inputs["shared_w13"], inputs["shared_w2"], 1.0, limit, shared)
        for expert, weight in zip(inputs["expert_ids"][token].tolist(), inputs["weights"][token].tolist(), strict=True):
            w13, w2 = inputs["w13"][expert], inputs["w2"][expert]
            expected[token] += literal_expert(x, w13, w2, weight, limit, activations)
    actual = mega_moe(**inputs, activations=activations)
    assert actual.dtype == dtype
    # A hidden value at the edge of two codes may round either way after a float32 or a float64 sum.
    assert_close(actual, expected, BOUND[dtype] if activations == shared == "bf16" else 1e-2)


def test_the_clamp_of_the_edge_case_bites():
    inputs = next(case for case in moe_cases.CASES if case.name == "edge").make(12)
    free = mega_moe(**(inputs | {"limit": 1e9}), activations="bf16")
    assert (mega_moe(**inputs, activations="bf16") - free).norm() > 0.1 * free.norm()


def test_experts_that_no_token_chose_are_not_read():
    inputs = next(case for case in moe_cases.CASES if case.name == "one").make(13)
    idle = [expert for expert in range(inputs["w13"].shape[0]) if expert not in inputs["expert_ids"].flatten().tolist()]
    inputs["w13"][idle] = torch.nan
    inputs["w2"][idle] = torch.nan
    assert mega_moe(**inputs, activations="bf16").isfinite().all()


def gradients(function: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Run once backwards from every output; the gradient of every float input."""
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    outputs = function(**(inputs | leaves))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    random = torch.Generator().manual_seed(14)
    loss = sum(
        (output.float() * torch.randn(output.shape, generator=random)).sum()
        for output in outputs
        if output.is_floating_point()
    )
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["demo", "edge"])
def test_every_op_has_gradients(name, dtype):
    def inputs(module: Any) -> dict[str, Any]:
        return next(case for case in module.CASES if case.name == name).make(15, dtype)

    streams = inputs(mhc_cases)["streams"]
    count = streams.shape[1]
    post_inputs = {
        "output": streams[:, 0],
        "streams": streams,
        "post": torch.rand(streams.shape[0], count),
        "comb": torch.rand(streams.shape[0], count, count),
    }
    head = inputs(mhc_cases)
    head_inputs = {
        "streams": streams, "fn": head["fn"][:count], "base": head["base"][:count], "scale": head["scale"][:1],
        "hc_eps": 1e-6, "norm_eps": 1e-6,
    }  # fmt: skip
    runs = [
        (rms_norm, inputs(norm_cases)),
        (fake_quantize_fp8, inputs(quant_cases)),
        (apply_rope, inputs(rope_cases)),
        (linear, inputs(gemm_cases) | {"quantize": True}),
        (grouped_out_proj, inputs(out_cases) | {"quantize": True}),
        (mhc_pre, inputs(mhc_cases)),
        (mhc_post, post_inputs),
        (mhc_head, head_inputs),
        (mega_moe, inputs(moe_cases) | {"activations": "fp4"}),
    ]
    for function, arguments in runs:
        for argument, gradient in gradients(function, arguments).items():
            assert gradient is not None, (function.__name__, argument)
            assert gradient.isfinite().all(), (function.__name__, argument)
            assert gradient.any(), (function.__name__, argument)
    routed = gradients(route, inputs(router_cases))
    assert routed["x"].any()
    assert routed["gate_weight"].any()
    assert routed["bias"] is None  # used for the choice only


def test_sampling_cases_run():
    for case in sampling_cases.CASES:
        if case.name in SMALL:
            inputs = case.make(16)
            drawn = sample(**inputs)
            assert drawn.shape == (case.num_tokens,)
            greedy = inputs["temperature"] == 0
            assert torch.equal(drawn[greedy], inputs["logits"][greedy].argmax(-1))
