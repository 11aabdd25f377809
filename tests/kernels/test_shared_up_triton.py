"""The shared expert's first product beside the router, by the interpreter on the CPU, against float64."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.experts import make as make_experts
from support.poison import poisoned  # noqa: F401

from dsv4_kernels.arrival import NUM_COUNTERS, counters
from dsv4_kernels.cases import EDGE, FLASH, PRO, Shapes
from dsv4_kernels.deterministic import deterministic
from dsv4_kernels.gemm.fp8 import Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.mega_moe import reference
from dsv4_kernels.mega_moe import triton as moe
from dsv4_kernels.mega_moe.shared_up import SharedUp, empty_hidden
from dsv4_kernels.mega_moe.tiles import empty_tiles, make_tiles
from dsv4_kernels.quant import dequantize_fp8, dequantize_fp8_blocks, quantize_fp8, quantize_fp8_blocks
from dsv4_kernels.router.cases import Case
from dsv4_kernels.router.triton import route

LIMIT = 2.0  # a fourth of the products passes the clamp
# Hidden and intermediate size, experts. As Pro: seven splits of two blocks of K, and programs that the router's grid of
# three does not divide; as Flash: four of two. One block of K alone, and as many splits as blocks.
SIZES = {"pro": (1792, 1664, 130), "flash": (1024, 2560, 64), "one block": (128, 128, 5), "odd": (384, 256, 70)}
pytestmark = pytest.mark.usefixtures("poisoned")


def make(num_tokens, name="pro"):
    """Inputs of `route`, the product to make besides, and the values of its weight."""
    hidden, width, num_experts = SIZES[name]
    inputs = Case(name, num_tokens, Shapes(hidden, *(1,) * 6, num_experts, 3, 1, 4, 1000, 2.5, 1.0)).make(3)
    inputs = {key: value.bfloat16() if key in ("x", "gate_weight") else value for key, value in inputs.items()}
    draw = torch.Generator().manual_seed(num_tokens)
    codes, scale = quantize_fp8_blocks(torch.randn(2 * width, hidden, generator=draw) * 2 / hidden**0.5)
    shared = SharedUp.build(quantize_rows(inputs["x"]), Fp8Weight.from_checkpoint(codes, scale), LIMIT)
    return inputs, shared, dequantize_fp8_blocks(codes, scale)


def row(hidden: Fp8Rows, number: int):
    """Bytes of one row."""
    return hidden.codes[number].view(torch.uint8).tolist(), hidden.exponents[number].tolist()


@pytest.mark.parametrize("num_tokens", [1, 3, 16])
@pytest.mark.parametrize("name", SIZES)
def test_hidden_values_are_the_rounded_ones_of_float64(name, num_tokens):
    """But for one in a thousand, which is the next E4M3 number: a float32 sum decides a bfloat16 rounding otherwise."""
    inputs, shared, weight = make(num_tokens, name)
    route(**inputs, shared=shared)
    x = dequantize_fp8(shared.rows.codes, shared.rows.exponents, 128)
    gate_up = (x.double() @ weight.double().t()).bfloat16()
    codes, exponents = quantize_fp8(reference._activate(gate_up, LIMIT).bfloat16(), 128)
    assert torch.equal(shared.hidden.exponents, exponents)
    found, expected = shared.hidden.codes.float(), codes.float()
    assert (found != expected).float().mean() < 1e-3
    assert ((found - expected).abs() <= expected.abs().clamp_min(2**-6) / 8).all()  # a step is that or less


@pytest.mark.parametrize("num_tokens", [1, 3, 16])
def test_the_router_chooses_the_same_and_fills_its_tiles(num_tokens):
    inputs, shared, _ = make(num_tokens)
    alone, tiles = route(**inputs), empty_tiles(num_tokens * 3, 130, 16, torch.device("cpu"))
    found = route(**inputs, tiles=tiles, shared=shared)
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))
    expected = make_tiles(alone[1], 130, 16)
    assert torch.equal(tiles.pairs, expected.pairs)
    assert torch.equal(tiles.experts, expected.experts)


def test_the_counters_are_zero_again_and_the_next_launch_has_the_same_bits():
    inputs, shared, _ = make(3)
    assert shared.num_tiles * shared.num_splits % 3  # some programs have nothing to do
    other = SharedUp.build(shared.rows, shared.w13, LIMIT)
    for each in (shared, other):
        route(**inputs, shared=each)
        assert not counters(torch.device("cpu"), NUM_COUNTERS).any()
    assert all(row(shared.hidden, number) == row(other.hidden, number) for number in range(3))


@pytest.mark.parametrize("num_tokens", [3, 16])
def test_a_token_has_the_same_bits_alone(num_tokens):
    inputs, shared, _ = make(num_tokens)
    route(**inputs, shared=shared)
    last = inputs | {key: inputs[key][-1:].contiguous() for key in ("x", "token_ids")}
    alone = SharedUp.build(quantize_rows(last["x"]), shared.w13, LIMIT)
    route(**last, shared=alone)
    assert row(alone.hidden, 0) == row(shared.hidden, num_tokens - 1)


def test_padding_and_nan_change_no_other_row():
    inputs, shared, _ = make(5)
    route(**inputs, shared=shared)
    inputs["x"][[1, 4]] = torch.nan  # of which 4 is padding
    positions = torch.tensor([0, 1, 2, 3, -1], dtype=torch.int32)
    found = SharedUp.build(quantize_rows(inputs["x"]), shared.w13, LIMIT)
    _, ids = route(**inputs, positions=positions, shared=found)
    assert (ids >= 0).any(1).tolist() == [True] * 4 + [False]
    assert (found.hidden.exponents[1] == 255).all()
    assert all(row(found.hidden, number) == row(shared.hidden, number) for number in (0, 2, 3))


def parts_of(inputs, tiles, shared_hidden=None):
    """Of `expert_parts`, from x as the engine quantises it."""
    rows = quantize_rows(inputs["x"])
    names = ("weights", "w13", "w2", "shared_w13", "shared_w2", "limit", "activations")
    given = {name: inputs[name] for name in names}
    return moe.expert_parts(rows.codes, rows.exponents, rows, tiles=tiles, **given, shared_hidden=shared_hidden)


@pytest.mark.parametrize("form", ["fp8", "fp4"])
@pytest.mark.parametrize("num_tokens", [1, 3, 16])
def test_the_experts_go_on_from_the_hidden_values_and_do_not_read_the_weight_again(num_tokens, form):
    inputs, _ = make_experts(num_tokens, EDGE, form=form)
    tiles = make_tiles(inputs["expert_ids"], 5, 16)
    expected = parts_of(inputs, tiles)
    shared = moe.up_beside_router(quantize_rows(inputs["x"]), inputs["shared_w13"], tiles, inputs["limit"])
    assert shared.num_splits == 3
    gate = Case("edge", num_tokens, EDGE).make(3, torch.bfloat16) | {"x": inputs["x"]}
    route(**gate, shared=shared)
    inputs["shared_w13"].exponents.fill_(255)  # NaN
    found = parts_of(inputs, tiles, shared.hidden)
    assert torch.equal(found[:, :3], expected[:, :3])
    found, expected = found[:, 3].double(), expected[:, 3].double()
    assert (found - expected).norm() <= 1e-3 * expected.norm()  # the bound of the experts' own tests


def test_few_tokens_of_small_tiles_are_beside_the_router():
    weight = Fp8Weight(torch.zeros(256, 128).to(torch.float8_e4m3fn), torch.zeros(2, 1, dtype=torch.uint8))

    def beside(num_tokens, tile_tokens=16):
        tiles = empty_tiles(num_tokens, 5, tile_tokens, torch.device("cpu"))
        return moe.up_beside_router(empty_hidden(num_tokens, 128, torch.device("cpu")), weight, tiles, LIMIT)

    assert [beside(num_tokens) is not None for num_tokens in (1, 16, 17)] == [True, True, False]
    assert beside(1, tile_tokens=32) is None
    with deterministic():
        assert beside(1) is None


@pytest.mark.parametrize(
    ("width", "depth", "splits"),
    [
        (PRO.moe_intermediate_size, PRO.hidden_size, 4),
        (FLASH.moe_intermediate_size, FLASH.hidden_size, 8),
        (3072, 37 * 128, 1),  # a prime number of blocks
        (200 * 128, 7168, 1),  # tiles for more programs than there should be
        (128, 384, 3),
    ],
)
def test_splits_are_even_and_make_about_a_program_for_each_multiprocessor(width, depth, splits):
    weight = Fp8Weight(
        torch.empty(depth, dtype=torch.float8_e4m3fn).expand(2 * width, depth),
        torch.empty(depth // 128, dtype=torch.uint8).expand(2 * width // 128, depth // 128),
    )
    shared = SharedUp(None, weight, LIMIT, None)
    assert (shared.num_tiles, shared.num_splits) == (width // 128, splits)


def test_wrong_arguments_are_refused():
    inputs, shared, _ = make(3)
    with pytest.raises(ValueError, match=r"rows are \[17, 1792\], w13 \[3328, 1792\].*T at most 16"):
        SharedUp.build(quantize_rows(torch.ones(17, 1792)), shared.w13, LIMIT)
    with pytest.raises(ValueError, match=r"rows are \[1, 256\], w13 \[3328, 1792\]"):
        SharedUp.build(quantize_rows(torch.ones(1, 256)), shared.w13, LIMIT)
    with pytest.raises(ValueError, match=r"x is \[3, 1792\], rows of the shared expert \[1, 1792\]"):
        route(**inputs, shared=SharedUp.build(quantize_rows(torch.ones(1, 1792)), shared.w13, LIMIT))
