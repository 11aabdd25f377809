"""Deterministic mode, an operation at a time, in the interpreter: a row's bits alone and in batches of other sizes.

The sizes straddle every threshold between forms. That they could show a difference is stated where the interpreter,
which adds up K of a product exactly, can see one: the same sizes without the mode.
"""

import dataclasses

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from triton.runtime.interpreter import InterpretedFunction

from dsv4_kernels import capability
from dsv4_kernels.cases import DEMO, Shapes, generator, nonzero
from dsv4_kernels.compressor.cases import MAIN
from dsv4_kernels.compressor.cases import Case as CompressorCase
from dsv4_kernels.compressor.triton import compress_c128
from dsv4_kernels.deterministic import deterministic, is_deterministic
from dsv4_kernels.gemm import library
from dsv4_kernels.gemm.fp8 import Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.gemm.triton import grouped_fp8_out, linear_bf16, linear_fp8, tiles_for
from dsv4_kernels.indexer import triton as indexer
from dsv4_kernels.indexer.cases import Case as IndexerCase
from dsv4_kernels.mega_moe import triton as moe
from dsv4_kernels.mega_moe.cases import Case as ExpertCase
from dsv4_kernels.mega_moe.weights import relayout
from dsv4_kernels.metadata import C128, Rows
from dsv4_kernels.mhc import reference as mhc_reference
from dsv4_kernels.mhc import triton as mhc
from dsv4_kernels.quant.reference import quantize_fp4_weight, quantize_fp8_blocks
from dsv4_kernels.router.triton import route
from dsv4_kernels.sparse_attention.cases import Case as AttentionCase
from dsv4_kernels.sparse_attention.triton import sparse_attention


def bits(found):
    """Bytes of each row of tensors."""
    tensors = []
    for each in found:
        tensors += [each.codes, each.exponents] if isinstance(each, Fp8Rows) else [each]
    return [tensor.contiguous().view(torch.uint8).reshape(len(tensor), -1) for tensor in tensors]


def same_rows(run, sizes):
    """Whether rows have the same bits in batches of the first so many rows; the last of `sizes` is the largest."""
    whole = bits(run(sizes[-1]))
    found = [(size, bits(run(size))) for size in sizes[:-1]]
    return all(torch.equal(one, other[:size]) for size, each in found for one, other in zip(each, whole, strict=True))


def fp8_weight(num_rows, depth, seed=1):
    values = nonzero(generator(seed), num_rows, depth)
    return Fp8Weight.from_checkpoint(*quantize_fp8_blocks(values))


def test_the_switch_is_off_and_comes_back():
    assert not is_deterministic()
    with deterministic():
        assert is_deterministic()
        with deterministic(False):
            assert not is_deterministic()
        assert is_deterministic()
    assert not is_deterministic()


def test_the_library_is_left_out(monkeypatch):
    monkeypatch.setattr(capability, "is_hopper", lambda device: True)
    x = torch.empty(64, 128)
    assert library.is_for_library(x)
    with deterministic():
        assert not library.is_for_library(x)


@pytest.mark.parametrize(("num_rows", "depth"), [(2048, 7168), (7168, 16384), (73728, 1536), (24, 128)])
@pytest.mark.parametrize("form", ["fp8", "bf16", "wide"])
def test_k_is_cut_by_the_weight_alone(num_rows, depth, form):
    with deterministic():
        cuts = {tiles.splits * tiles.turns for tiles in (tiles_for(n, num_rows, depth, form) for n in range(1, 400))}
    assert len(cuts) == 1


@pytest.mark.parametrize("kind", ["fp8", "bf16", "wide", "wide of halves"])
def test_products(kind):
    """One tile of rows, so as many splits as K allows: three; 64 tokens are the last with a program for each."""
    depth, sizes = 1536, [1, 17, 64, 65, 130]
    x = nonzero(generator(2), sizes[-1], 2 * depth, scale=3.0).bfloat16()
    wide, groups = fp8_weight(128, depth), 2 if kind == "wide of halves" else 1
    narrow, plain = fp8_weight(40, depth), nonzero(generator(3), 40, depth).bfloat16()

    def run(size):
        if kind == "bf16":
            return [linear_bf16(x[:size, :depth], plain)]
        if kind == "fp8":
            return [linear_fp8(quantize_rows(x[:size, :depth]), narrow, out_dtype=torch.float32)]
        return [grouped_fp8_out(x[:size, : groups * depth], wide, groups)]

    with deterministic():
        assert same_rows(run, sizes)
    if kind == "bf16":  # sums of E4M3 products are exact, and results rounded to it show little
        assert not same_rows(run, sizes)


def test_the_boundary_of_sublayers():
    hidden, sizes = 384, [1, 2, 3, 65, mhc.MANY]
    random, mixes = generator(4), 24
    streams = nonzero(random, sizes[-1], 4, hidden).bfloat16()
    output = nonzero(random, sizes[-1], hidden).bfloat16()
    constants = {"fn": nonzero(random, mixes, 4 * hidden, scale=0.05), "base": nonzero(random, mixes),
                 "scale": nonzero(random, mixes)}  # fmt: skip
    settings = {"sinkhorn_iters": 2, "hc_eps": 1e-6, "norm_eps": 1e-6}
    _, post, comb = mhc_reference.mhc_pre(streams, **constants, **settings)
    norm = torch.rand(hidden, generator=random) + 0.5

    def run(size):
        rows = {"output": output[:size], "post": post[:size], "comb": comb[:size]}
        return mhc.mhc_boundary(streams[:size], norm=norm, **constants, **settings, **rows)

    with deterministic():
        assert same_rows(run, sizes)
    assert not same_rows(run, sizes)


def test_the_router():
    """Slices of the hidden size, which are cut at 64 and 1,024 tokens."""
    hidden, num_experts, sizes = 1536, 8, [1, 16, 65, 257]
    random = generator(5)
    x, gate = nonzero(random, sizes[-1], hidden).bfloat16(), nonzero(random, num_experts, hidden, scale=0.02).bfloat16()

    def run(size):
        ids = torch.zeros(size, dtype=torch.int64)
        return route(x[:size], gate, bias=None, tid2eid=None, token_ids=ids, top_k=2, scale=1.5)

    with deterministic():
        assert same_rows(run, sizes)
    assert not same_rows(run, sizes)


def test_the_experts():
    """Tiles of 16 to 64 pairs; up to 21 tokens the shared expert would stand in the same launches."""
    shapes = dataclasses.replace(DEMO, n_routed_experts=4, moe_intermediate_size=1024)
    sizes = [1, 21, 22, 60]
    case = ExpertCase("experts", sizes[-1], shapes).make(6, torch.bfloat16)
    weights = {name: relayout(*quantize_fp4_weight(case[name]), form="fp8") for name in ("w13", "w2")}
    for name in ("shared_w13", "shared_w2"):
        weights[name] = Fp8Weight.from_checkpoint(*quantize_fp8_blocks(case[name]))

    def run(size):
        rows = {key: case[key][:size].contiguous() for key in ("x", "expert_ids", "weights")}
        return [moe.mega_moe(**rows, **weights, limit=case["limit"], activations="fp8")]

    tiles = {moe.choose_tile(size, shapes.num_experts_per_tok, shapes.n_routed_experts, True) for size in sizes}
    assert tiles == {16, 32, 64}
    with deterministic():
        assert same_rows(run, sizes)


def test_attention():
    """Alone a row would have its keys in four parts; 130 rows leave no split."""
    shapes = Shapes(256, 128, 8, 128, 64, *(1,) * 5, 4, 1, 1.0, 1.0)
    others = 129
    case = AttentionCase("crowd", shapes, ((600, 1), *[(9 + n, 1) for n in range(others)]), ratio=4, top_k=128)
    inputs = case.make(5)
    first = Rows(*(getattr(inputs["rows"], name)[:1] for name in ("slots", "positions", "firsts", "counts")))
    alone = inputs | {key: inputs[key][:1] for key in ("q", "rotations", "chosen")} | {"rows": first}

    def both():
        return sparse_attention(**alone)[0].clone(), sparse_attention(**inputs)[0]

    with deterministic():
        assert torch.equal(*both())
    assert not torch.equal(*both())


def test_the_choice_of_entries(monkeypatch):
    monkeypatch.setattr(indexer, "ONE_LAUNCH_ROWS", 2)
    names = []
    run = InterpretedFunction.run
    monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *given, **more: (
        names.append(kernel.fn.__name__), run(kernel, *given, **more)))  # fmt: skip
    arguments = IndexerCase("crowd", (3000, 600), (1, 3)).make(4, 64, 7)
    rows = Rows(*(getattr(arguments["rows"], name)[:1] for name in ("slots", "positions", "firsts", "counts")))
    alone = arguments | {key: arguments[key][:1] for key in ("q", "weights")} | {"rows": rows}
    with deterministic():
        chosen = [indexer.select(**given)[0] for given in (alone, arguments)]
    assert torch.equal(*chosen)
    assert names == ["_scores", "_top_k"] * 2  # the same kernels


def test_entries_of_128_rows_do_not_show_how_the_prompt_was_cut():
    arguments, _ = CompressorCase("prompt", (3,), (140,)).make(C128, MAIN, 8)
    slot, start = arguments["rows"].slots[0], arguments["rows"].positions[0]

    def run(counts):
        state, planes, done = arguments["state"].clone(), [plane.clone() for plane in arguments["planes"]], 0
        for count in counts:
            each = (torch.tensor([int(value)], dtype=torch.int32) for value in (slot, start + done, count))
            own = {key: arguments[key][done : done + count] for key in ("raw", "rotations")}
            own |= {"rows": Rows.build(*each, count), "state": state, "planes": tuple(planes)}
            compress_c128(**(arguments | own))
            done += count
        return [state[slot], *planes]

    cuts = [140], [1, 60, 2, 70, 7], [124, 16]
    with deterministic():
        found = [bits(run(counts)) for counts in cuts]
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(other, found[0], strict=True))
    assert not all(torch.equal(*pair) for pair in zip(bits(run(cuts[0])), bits(run(cuts[1])), strict=True))
