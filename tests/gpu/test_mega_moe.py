"""The Triton experts on a real GPU against the reference: true sizes, with as many experts as float32 has room for."""

import dataclasses

import pytest
import torch

from dsv4_kernels.capability import is_hopper
from dsv4_kernels.cases import DEMO, FLASH, PRO
from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.mega_moe import triton as moe
from dsv4_kernels.mega_moe.cases import packed_weight, routed_tokens
from dsv4_kernels.mega_moe.reference import mega_moe as expected_of
from dsv4_kernels.mega_moe.tiles import make_tiles
from dsv4_kernels.mega_moe.triton import TILES, mega_moe
from dsv4_kernels.mega_moe.weights import form_for, relayout
from dsv4_kernels.quant import dequantize_fp4_weight, dequantize_fp8_blocks, quantize_fp8_blocks

NUM_EXPERTS = 12
SHAPES = {name: dataclasses.replace(sizes, n_routed_experts=NUM_EXPERTS) for name, sizes in
          {"pro": PRO, "flash": FLASH, "demo": DEMO}.items()}  # fmt: skip
# Relative norm. Sums in another order move a bfloat16 rounding now and then, and that moves an FP8 or FP4 rounding of a
# hidden value to its neighbour; the shared expert's hidden values are FP8 always (its own test has the same bound).
BOUND = {"bf16": 5e-3, "fp8": 5e-3, "fp4": 1e-2}
BOUND_BF16_ALONE = 3e-3
LARGER = {"bf16": [(150, 64)], "fp8": [(100, 32), (150, 64), (300, 128)], "fp4": [(300, 128)]}  # tokens, tile_tokens


@pytest.fixture(scope="module", params=SHAPES)
def layer(request):
    """(sizes, values of all weights, codes and scales of the routed experts', the shared one's for the kernels)."""
    sizes = SHAPES[request.param]
    random = torch.Generator("cuda").manual_seed(1)
    values, stored, shared = {}, {}, {}
    for name, shape in {
        "w13": (2 * sizes.moe_intermediate_size, sizes.hidden_size),
        "w2": (sizes.hidden_size, sizes.moe_intermediate_size),
    }.items():
        stored[name] = packed_weight(random, NUM_EXPERTS, *shape)
        values[name] = torch.stack([dequantize_fp4_weight(*one).bfloat16() for one in zip(*stored[name], strict=True)])
        codes, scale = quantize_fp8_blocks(torch.randn(shape, device="cuda", generator=random) * shape[1] ** -0.5)
        values[f"shared_{name}"] = dequantize_fp8_blocks(codes, scale)
        shared[f"shared_{name}"] = Fp8Weight.from_checkpoint(codes, scale)
    return sizes, values, stored, shared


def runs(layer, activations):
    """The kernel's weights in each form that this GPU runs."""
    for form in {"bf16", form_for(activations, torch.cuda.get_device_capability()[0])}:
        yield layer[3] | {name: relayout(codes.clone(), scale, form=form) for name, (codes, scale) in layer[2].items()}


def tokens(layer, num_tokens, seed=2):
    given = routed_tokens(torch.Generator("cuda").manual_seed(seed), num_tokens, layer[0])
    return {key: given[key] for key in ("x", "expert_ids", "weights")}


@pytest.mark.parametrize("activations", ["bf16", "fp8", "fp4"])
def test_equals_the_reference(layer, activations):
    options = {"limit": layer[0].swiglu_limit, "activations": activations}
    for weights in runs(layer, activations):
        for num_tokens, tile in ((0, None), (1, None), (7, None), (40, 16), *LARGER[activations]):
            if tile == TILES[-1] and weights["w13"].form != "fp4":
                continue
            given = tokens(layer, num_tokens)
            found = mega_moe(**given, **weights, **options, tile_tokens=tile)
            if num_tokens:
                expected = expected_of(**given, **layer[1], **options, quantize_shared=True)
                error = (found.double() - expected.double()).norm() / expected.double().norm()
                assert error <= BOUND[activations], (num_tokens, tile)


@pytest.mark.parametrize("num_tokens", [1, 40, 500])
def test_warps_with_roles_equal_the_reference_and_have_the_same_bits_each_time(layer, num_tokens):
    """Whoever is ahead; with one part of a tile for a program, and with several."""
    if not is_hopper(torch.device("cuda", 0)):
        pytest.skip("a kernel of Hopper")
    options = {"limit": layer[0].swiglu_limit, "activations": "fp8"}
    stored = {name: relayout(codes.clone(), scale, form="fp8") for name, (codes, scale) in layer[2].items()}
    given = tokens(layer, num_tokens)
    first = mega_moe(**given, **layer[3], **stored, **options, tile_tokens=64)
    expected = expected_of(**given, **layer[1], **options, quantize_shared=True)
    assert (first.double() - expected.double()).norm() / expected.double().norm() <= BOUND["fp8"]
    for _ in range(20):
        assert torch.equal(mega_moe(**given, **layer[3], **stored, **options, tile_tokens=64), first)


def test_a_tile_has_the_bits_of_the_triton_kernels(layer, monkeypatch):
    """So deterministic mode may take either."""
    options = {"limit": layer[0].swiglu_limit, "activations": "fp8", "tile_tokens": 64}
    stored = {name: relayout(codes.clone(), scale, form="fp8") for name, (codes, scale) in layer[2].items()}
    given = tokens(layer, 150)
    found = mega_moe(**given, **layer[3], **stored, **options)
    monkeypatch.setattr(moe, "is_hopper", lambda device: False)
    assert torch.equal(found, mega_moe(**given, **layer[3], **stored, **options))


@pytest.mark.parametrize("tile_tokens", [16, 64])
def test_outputs_go_where_their_tokens_live(layer, tile_tokens):
    """Two ranks, here two pieces of this GPU's memory, with half of the tokens each, behind eight other values."""
    stored = [relayout(codes.clone(), scale, form="fp8") for codes, scale in layer[2].values()]
    x, expert_ids, weights = tokens(layer, 150).values()
    given = *moe.rounded_inputs(x, "fp8", "fp8"), expert_ids, weights, *stored
    options = {"limit": layer[0].swiglu_limit, "activations": "fp8", "tile_tokens": tile_tokens}
    size = 75 * expert_ids.shape[1] * x.shape[1]
    ranks = [torch.full((8 + size,), 7.0, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    addresses = torch.tensor([rank.data_ptr() for rank in ranks], device="cuda")
    moe.send_outputs(moe.Homes(addresses, 16, 75), *given, **options)
    assert torch.equal(torch.cat([rank[8:] for rank in ranks]), moe.pair_outputs(*given, **options).flatten())
    assert all((rank[:8] == 7.0).all() for rank in ranks)


def test_bf16_experts_without_the_shared_one(layer):
    """What is left when the only FP8 values in it are zero."""
    options = {"limit": layer[0].swiglu_limit, "activations": "bf16"}
    values = layer[1] | {name: torch.zeros_like(layer[1][name]) for name in layer[3]}
    zeros = {name: Fp8Weight(torch.zeros_like(one.codes), one.exponents) for name, one in layer[3].items()}
    for weights in runs(layer, "bf16"):
        for num_tokens in (1, 7, 40):
            given = tokens(layer, num_tokens)
            found = mega_moe(**given, **weights | zeros, **options)
            expected = expected_of(**given, **values, **options, quantize_shared=True)
            error = (found.double() - expected.double()).norm() / expected.double().norm()
            assert error <= BOUND_BF16_ALONE, num_tokens


@pytest.mark.parametrize("activations", ["bf16", "fp8", "fp4"])
def test_padding_nan_and_batches(layer, activations):
    options = {"limit": layer[0].swiglu_limit, "activations": activations, "tile_tokens": 16}
    for weights in runs(layer, activations):
        given = tokens(layer, 40)
        clean = mega_moe(**given, **weights, **options)
        given["expert_ids"][[3, 39]] = -1
        given["x"][[3, 39]] = torch.inf
        given["x"][11, 77] = torch.nan
        found = mega_moe(**given, **weights, **options)
        assert found[[3, 11, 39]].isnan().all()  # 3 and 39 because nothing was written
        others = [row for row in range(40) if row not in (3, 11, 39)]
        assert torch.equal(found[others], clean[others])
        alone = {key: value[20:21].contiguous() for key, value in given.items()}
        assert torch.equal(mega_moe(**alone, **weights, **options), clean[20:21])


def test_in_a_graph_the_experts_of_a_replay_are_those_of_its_ids(layer):
    options = {"limit": layer[0].swiglu_limit, "activations": "fp8"}
    weights = next(runs(layer, "fp8"))
    given, other = tokens(layer, 24), tokens(layer, 24, seed=3)
    mega_moe(**given, **weights, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mega_moe(**given, **weights, **options)
    for name, value in given.items():
        value.copy_(other[name])
    graph.replay()
    assert torch.equal(out, mega_moe(**other, **weights, **options))


def test_tiles_of_many_pairs():
    ids = torch.randint(-1, 384, (8192, 6), device="cuda")
    tiles = make_tiles(ids, 384, 128)
    active = tiles.experts >= 0
    order = torch.argsort(ids.flatten(), stable=True)[int((ids < 0).sum()) :]
    assert torch.equal(tiles.pairs[: len(order)].long(), order)
    counts = torch.bincount(ids[ids >= 0], minlength=384)
    assert torch.equal(tiles.experts[active], torch.arange(384, device="cuda", dtype=torch.int32).repeat_interleave(
        (counts + 127) // 128))  # fmt: skip
    assert int(tiles.counts[active].sum()) == len(order)
    assert torch.equal(tiles.firsts[active], tiles.counts[active].cumsum(0, dtype=torch.int32) - tiles.counts[active])
