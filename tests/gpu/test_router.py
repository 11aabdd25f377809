"""The Triton router on a real GPU, against scores in float64."""

import pytest
import torch

from dsv4_kernels.cases import DEMO, FLASH, PRO
from dsv4_kernels.mega_moe.tiles import empty_tiles, make_tiles
from dsv4_kernels.quant import fake_quantize_fp8
from dsv4_kernels.router.cases import Case
from dsv4_kernels.router.triton import route

BOUND = 1e-5  # of a weight, relative; and how far a chosen score may lie below one that was not
SHAPES = {"pro": PRO, "flash": FLASH, "demo": DEMO}


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 9, 300, 2000])
@pytest.mark.parametrize("name", SHAPES)
def test_the_best_experts_and_their_weights(name, num_tokens, weight_dtype):
    inputs = Case(name, num_tokens, SHAPES[name]).make(5, torch.bfloat16)
    inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    inputs["gate_weight"] = inputs["gate_weight"].to(weight_dtype)
    positions = torch.arange(num_tokens, dtype=torch.int32, device="cuda")
    positions[3::7] = -1
    real = positions >= 0
    inputs["x"][~real] = torch.nan
    weights, ids = route(**inputs, positions=positions)
    assert (ids[~real] == -1).all()
    assert not weights[~real].any()
    weights, ids = weights[real], ids[real]
    logits = inputs["x"][real].double() @ inputs["gate_weight"].double().t()
    scores = torch.nn.functional.softplus(logits).sqrt()
    biased = scores + inputs["bias"].double()
    chosen = biased.gather(1, ids)
    assert (ids[:, :-1] < ids[:, 1:]).all()
    rest = biased.scatter(1, ids, -torch.inf)
    assert (rest <= chosen.amin(1, keepdim=True) + BOUND).all()
    expected = scores.gather(1, ids)
    expected *= inputs["scale"] / expected.sum(1, keepdim=True)
    assert ((weights - expected).abs() <= BOUND * expected).all()


def test_hash_layers_and_ties():
    inputs = Case("flash", 50, FLASH).make(6, torch.bfloat16)
    inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    table = torch.rand(FLASH.vocab_size, 8, device="cuda").argsort(1)[:, :6].contiguous()
    _, ids = route(**(inputs | {"tid2eid": table, "bias": None}))
    assert torch.equal(ids, table[inputs["token_ids"]].sort(dim=1).values)
    inputs["gate_weight"][:] = inputs["gate_weight"][:1].clone()
    inputs["bias"][:] = -1.0
    assert route(**inputs)[1].tolist() == [[0, 1, 2, 3, 4, 5]] * 50


@pytest.mark.parametrize("num_tokens", [1, 5, 16, 64, 85, 86, 300])
def test_the_same_launch_fills_the_tiles_and_rounds_x_again_and_again(num_tokens):
    """In a graph, so that launches follow each other as closely as they can: all of them find the counters zero."""
    inputs = Case("pro", num_tokens, PRO).make(7, torch.bfloat16)
    inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    inputs["gate_weight"] = inputs["gate_weight"].bfloat16()
    expected, ids = route(**inputs)
    tiles = [empty_tiles(num_tokens * 6, 384, 16, ids.device) for _ in range(20)]
    rounded = torch.full_like(inputs["x"], torch.nan)
    route(**inputs, tiles=tiles[0], rounded=rounded)
    rounded.fill_(torch.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [route(**inputs, tiles=one, rounded=rounded) for one in tiles]
    graph.replay()
    plain = make_tiles(ids, 384, 16)
    used = plain.experts >= 0
    assert torch.equal(rounded, fake_quantize_fp8(inputs["x"], 128))
    for (weights, chosen), one in zip(found, tiles, strict=True):
        assert torch.equal(weights, expected)
        assert torch.equal(chosen, ids)
        assert torch.equal(one.pairs, plain.pairs)
        assert torch.equal(one.experts, plain.experts)
        assert torch.equal(one.firsts[used], plain.firsts[used])
        assert torch.equal(one.counts[used], plain.counts[used])
