"""The Triton experts against the reference, by the interpreter on the CPU."""

import pytest
import torch
import triton
import triton.language as tl
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.experts import make
from support.poison import poisoned  # noqa: F401

from dsv4_kernels.cases import DEMO, EDGE
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.mega_moe import product, reference
from dsv4_kernels.mega_moe import triton as moe
from dsv4_kernels.mega_moe.tiles import make_tiles, max_tiles
from dsv4_kernels.mega_moe.weights import relayout
from dsv4_kernels.quant.cases import adversarial
from dsv4_kernels.quant.reference import (
    dequantize_fp4_weight,
)

FORMS = [("bf16", "bf16"), ("fp8", "bf16"), ("fp8", "fp8"), ("fp8", "fp4"), ("fp4", "bf16"), ("fp4", "fp4")]
BOUND = 1e-3  # relative norm: a float32 sum in another order decides a bfloat16 or FP8 rounding now and then
pytestmark = pytest.mark.usefixtures("poisoned")


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found.double() - expected.double()).norm() <= BOUND * expected.double().norm()


@pytest.mark.parametrize(("activations", "form"), FORMS)
@pytest.mark.parametrize(("num_tokens", "shapes", "tile"), [(1, DEMO, None), (7, EDGE, None), (20, EDGE, 32)])
def test_equals_the_reference(num_tokens, shapes, tile, activations, form):
    inputs, given = make(num_tokens, shapes, activations, form)
    assert_close(moe.mega_moe(**inputs, tile_tokens=tile), reference.mega_moe(**given))


@pytest.mark.parametrize(("activations", "form"), FORMS)
def test_no_tokens(activations, form):
    inputs, _ = make(0, DEMO, activations, form)
    assert moe.mega_moe(**inputs).shape == (0, 256)


@pytest.mark.parametrize(("activations", "form"), [("bf16", "bf16"), ("fp8", "fp8"), ("fp4", "fp4")])
def test_all_tokens_on_the_same_experts_fill_several_tiles(activations, form):
    inputs, given = make(40, EDGE, activations, form)
    inputs["expert_ids"] = given["expert_ids"] = torch.tensor([[3, 0, 4]]).expand(40, -1).contiguous()
    assert_close(moe.mega_moe(**inputs, tile_tokens=16), reference.mega_moe(**given))


def test_the_largest_tile():
    inputs, given = make(90, DEMO, "fp8", "fp4")
    inputs["expert_ids"] = given["expert_ids"] = torch.tensor([[7, 2]]).expand(90, -1).contiguous()
    assert_close(moe.mega_moe(**inputs, tile_tokens=128), reference.mega_moe(**given))


def parts_of(inputs, tile):
    """`expert_parts` as `mega_moe` calls it."""
    ids, activations = inputs["expert_ids"], inputs["activations"]
    return moe.expert_parts(
        *moe.rounded_inputs(inputs["x"], activations, inputs["w13"].form), quantize_rows(inputs["x"]),
        inputs["weights"], make_tiles(ids, inputs["w13"].num_experts, tile), inputs["w13"], inputs["w2"],
        inputs["shared_w13"], inputs["shared_w2"], limit=inputs["limit"], activations=activations,
    )  # fmt: skip


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize(("activations", "form"), [("bf16", "bf16"), ("fp8", "fp8"), ("fp8", "fp4"), ("fp4", "fp4")])
def test_each_part_is_that_of_its_expert_and_the_shared_one_is_last(activations, form, tile):
    inputs, given = make(19, EDGE, activations, form)
    parts = parts_of(inputs, tile)
    assert parts.shape == (19, 4, 384)
    options = {"limit": given["limit"], "activations": activations}
    shared = reference.shared_expert(
        given["x"], given["shared_w13"], given["shared_w2"], limit=given["limit"], quantize=True
    )
    assert_close(parts[:, 3], shared)
    for k in range(3):
        one = {name: given[name][:, k : k + 1] for name in ("expert_ids", "weights")}
        routed = {"x": given["x"], **one, "w13": given["w13"], "w2": given["w2"]}
        assert_close(parts[:, k], reference.add_routed(torch.zeros_like(shared), **routed, **options))


@pytest.mark.parametrize("form", ["fp8", "fp4"])
def test_routed_experts_take_the_rows_of_the_shared_one(form):
    """They read x as it was quantised for all; its scales lie column by column."""
    inputs, _ = make(9, EDGE, "fp8", form)
    rows, tiles = quantize_rows(inputs["x"]), make_tiles(inputs["expert_ids"], 5, 16)
    names = ("weights", "w13", "w2", "shared_w13", "shared_w2", "limit", "activations")
    given = {name: inputs[name] for name in names}
    found = moe.expert_parts(rows.codes, rows.exponents, rows, tiles=tiles, **given)
    assert rows.exponents.stride() == (1, 9)
    assert torch.equal(found, parts_of(inputs, 16))


def test_the_parts_of_ascending_experts_are_added_in_their_order():
    """What a hyper-connection does with the parts is what `combine` does, bit for bit."""
    inputs, _ = make(9, EDGE)
    inputs["expert_ids"] = inputs["expert_ids"].sort(dim=1).values
    total = torch.zeros(9, 384)
    for part in parts_of(inputs, 16).unbind(1):
        total += part.float()
    assert torch.equal(moe.mega_moe(**inputs, tile_tokens=16), total.bfloat16())


@pytest.mark.parametrize("form", ["bf16", "fp8", "fp4"])
def test_experts_that_no_token_chose_are_not_read(form):
    inputs, _ = make(2, DEMO, "fp8", form)
    expected = moe.mega_moe(**inputs)
    hit = inputs["expert_ids"].flatten().tolist()
    for name in ("w13", "w2"):
        scales = inputs[name].row_scales if form == "fp8" else inputs[name].scales
        scales[[expert for expert in range(12) if expert not in hit]] = 255  # NaN
    assert torch.equal(moe.mega_moe(**inputs), expected)


def test_rows_without_experts_are_padding_and_pairs_without_are_left_out():
    inputs, given = make(6, EDGE)
    complete = moe.mega_moe(**inputs)
    padding, partial = [1, 5], 3
    inputs["expert_ids"] = given["expert_ids"].clone()
    inputs["expert_ids"][padding] = -1
    inputs["expert_ids"][partial, 1] = -1
    inputs["x"] = given["x"].clone()
    inputs["x"][padding] = torch.inf
    found = moe.mega_moe(**inputs)
    assert found[padding].isnan().all()  # as poisoned: nothing was written
    assert torch.equal(found[[0, 2, 4]], complete[[0, 2, 4]])
    given["weights"] = given["weights"].clone()
    given["weights"][partial, 1] = 0
    assert_close(found[partial], reference.mega_moe(**given)[partial])


@pytest.mark.parametrize(("activations", "form"), FORMS)
def test_nan_in_one_token_stays_there(activations, form):
    inputs, _ = make(5, EDGE, activations, form)
    clean = moe.mega_moe(**inputs)
    inputs["x"][2, 200] = torch.nan
    found = moe.mega_moe(**inputs)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize(("activations", "form"), FORMS)
def test_a_token_has_the_same_bits_alone_and_in_a_batch_of_the_same_tiles(activations, form):
    inputs, _ = make(20, EDGE, activations, form)
    together = moe.mega_moe(**inputs, tile_tokens=16)
    alone = inputs | {key: inputs[key][13:14].contiguous() for key in ("x", "expert_ids", "weights")}
    assert torch.equal(moe.mega_moe(**alone, tile_tokens=16), together[13:14])


@pytest.mark.parametrize(("activations", "form"), FORMS)
def test_values_of_extreme_sizes(activations, form):
    """Rows of any size, groups with one large value, routing weights near zero: the clamp and all scales come up."""
    inputs, given = make(8, EDGE, activations, form)
    inputs["x"] *= torch.logspace(-7, 7, 8).view(8, 1)  # in place: `given` has the same tensors
    inputs["x"][:, 64] *= 1e4
    inputs["weights"] *= torch.logspace(0, -6, 8).view(8, 1)
    for found, expected in zip(moe.mega_moe(**inputs), reference.mega_moe(**given), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize(("activations", "form"), FORMS)
def test_values_that_a_rounding_gets_wrong(activations, form):
    """All equal, one huge value a group, subnormal, minus zero, ties: a token of each, all of its groups the same."""
    tokens = adversarial(128).clamp(-1e30, 1e30)  # beyond, sums are infinite
    inputs, given = make(len(tokens), EDGE, activations, form)
    x = tokens.bfloat16().repeat(1, inputs["x"].shape[1] // 128)
    inputs["x"], given["x"] = x, x
    found, expected = moe.mega_moe(**inputs), reference.mega_moe(**given)
    assert found.isfinite().all()
    errors = (found.double() - expected.double()).norm(dim=1)
    norms = expected.double().norm(dim=1)
    # One hidden value of a token whose FP8 rounding goes the other way, by 2^-4 of it, and of one token at most: which
    # it is depends on the order in which this processor's library adds.
    assert (errors > BOUND * norms).sum() <= 1
    assert (errors <= 2**-4 / inputs["w2"].depth ** 0.5 * norms).all()


@triton.jit
def unpack(words, scales, out, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    group = tl.arange(0, DEPTH // 32)[None, :]
    word = tl.arange(0, DEPTH // 8)[None, :]
    values = product._unpack(
        tl.load(words + (word // 16 * ROWS + row) * 16 + word % 16),
        tl.load(scales + group // 4 * ROWS * 4 + row * 4 + group % 4),
        ROWS,
        DEPTH,
    )
    tl.store(out + row * DEPTH + tl.arange(0, DEPTH)[None, :], values)


def test_unpacking_gives_every_code_at_every_place_with_every_scale_of_a_sane_weight():
    draw = torch.Generator().manual_seed(10)
    packed = torch.randint(0, 256, (1, 64, 128), generator=draw, dtype=torch.uint8)
    scale = torch.randint(64, 160, (1, 64, 8), generator=draw, dtype=torch.uint8)  # 2^-63 .. 2^32
    expected = dequantize_fp4_weight(packed, scale)[0]
    given = packed.clone()
    weight = relayout(given, scale.view(torch.float8_e8m0fnu), form="bf16")
    assert weight.values.data_ptr() == given.data_ptr()  # in place
    out = torch.empty(64, 256, dtype=torch.bfloat16)
    unpack[(1,)](weight.values, weight.scales, out, 64, 256)
    assert torch.equal(out.float() * 2.0**32, expected)
    assert torch.equal(out.signbit(), expected.signbit())
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(512, 32)
    assert all(len(place.unique()) == 16 for place in codes.unbind(1))
    assert len(scale.unique()) == 96


@triton.jit
def unpack_fp8(words, scales, out, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    group = tl.arange(0, DEPTH // 32)[None, :]
    word = tl.arange(0, DEPTH // 8)[None, :]
    values = product._unpack_fp8(
        tl.load(words + (word // 16 * ROWS + row) * 16 + word % 16),
        tl.load(scales + group // 4 * ROWS * 4 + row * 4 + group % 4),
        ROWS,
        DEPTH,
    )
    tl.store(out + row * DEPTH + tl.arange(0, DEPTH)[None, :], values)


def unpacked_fp8(packed, scale):
    """The values float32 of `relayout`'s weight [1, 64, 256], as the kernels make them."""
    weight = relayout(packed.clone(), scale, form="fp8")
    out = torch.empty(64, 256, dtype=torch.float8_e4m3fn)
    unpack_fp8[(1,)](weight.values, weight.scales, out, 64, 256)
    return out.float() * 2.0 ** (weight.row_scales[0].float() - 127).unsqueeze(1)


def test_e4m3_holds_every_code_at_every_place_where_the_scales_of_a_row_are_near_one_another():
    draw = torch.Generator().manual_seed(12)
    packed = torch.randint(0, 256, (1, 64, 128), generator=draw, dtype=torch.uint8)
    scale = torch.randint(0, 12, (1, 64, 8), generator=draw, dtype=torch.uint8)
    scale += torch.randint(40, 200, (1, 64, 1), generator=draw, dtype=torch.uint8)
    scale[0, 0] = torch.arange(8)  # the smallest there are
    expected = dequantize_fp4_weight(packed, scale)[0]
    found = unpacked_fp8(packed, scale)
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(512, 32)
    assert all(len(place.unique()) == 16 for place in codes.unbind(1))


def test_codes_far_below_the_largest_of_their_row_are_rounded_and_zeros_have_no_scale():
    draw = torch.Generator().manual_seed(13)
    packed = torch.randint(0, 256, (1, 64, 128), generator=draw, dtype=torch.uint8)
    scale = torch.full((1, 64, 8), 120, dtype=torch.uint8)
    scale[0, :, 3] = 120 - 11 - torch.arange(64) % 9
    packed[0, :, 64:80], scale[0, :, 4] = 0, 230
    expected = dequantize_fp4_weight(packed, scale)[0]
    found = unpacked_fp8(packed, scale)
    near = torch.ones(256, dtype=torch.bool)
    near[96:128] = False
    assert torch.equal(found[:, near], expected[:, near])
    step = 2.0 ** (120 - 11 - 127)  # FP4's magnitudes up to 2 are half a step apart there, the last two steps
    assert (found - expected).abs().max() <= 0.25 * step
    assert torch.equal(found[0, 96:128], expected[0, 96:128])  # just near enough


@pytest.mark.parametrize("form", ["bf16", "fp4"])
def test_what_a_step_reads_of_a_row_lies_together(form):
    draw = torch.Generator().manual_seed(11)
    packed = torch.randint(-128, 128, (2, 3, 1152), dtype=torch.int8, generator=draw)  # scales of a row: 72 bytes
    scale = torch.randint(0, 255, (2, 3, 72), dtype=torch.uint8, generator=draw)
    codes = packed.view(torch.uint8).clone()
    weight = relayout(packed, scale, form=form)
    assert weight.values.data_ptr() == packed.data_ptr()
    assert (weight.num_experts, weight.num_rows, weight.depth) == (2, 3, 2304)
    assert torch.equal(weight.scales, scale.view(2, 3, 18, 4).transpose(1, 2))
    blocks = codes.view(2, 3, 18, 64).transpose(1, 2)
    if form == "bf16":
        assert weight.values.shape == (2, 18, 3, 16)
        single = relayout(blocks.reshape(1, -1, 64).clone(), scale.view(1, -1, 4), form=form)
        assert torch.equal(weight.values.view(-1, 16), single.values.view(-1, 16))
    else:
        assert torch.equal(weight.values, blocks)


def test_half_a_block_is_refused():
    packed = torch.zeros(2, 3, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"packed is \[2, 3, 48\].*K a multiple of 128"):
        relayout(packed, torch.zeros(2, 3, 3, dtype=torch.uint8), form="fp4")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts", "tile"), [
    (1, 1, 1, 16), (3, 2, 5, 16), (400, 6, 12, 16), (300, 6, 40, 64), (260, 4, 7, 32),
])  # fmt: skip
def test_tiles_hold_every_pair_once_and_in_order(num_tokens, top_k, num_experts, tile, dtype):
    draw = torch.Generator().manual_seed(num_tokens)
    ids = (torch.randn(num_tokens, top_k, generator=draw).abs() * num_experts / 3).long().clamp_max(num_experts - 1)
    ids[torch.rand(num_tokens, top_k, generator=draw) < 0.1] = -1
    tiles = make_tiles(ids.to(dtype), num_experts, tile)
    flat = ids.flatten().tolist()
    expected = [[pair for pair, found in enumerate(flat) if found == expert] for expert in range(num_experts)]
    found = [[] for _ in range(num_experts)]
    active = tiles.experts >= 0
    assert active.tolist() == sorted(active.tolist(), reverse=True)  # those with nothing to do come last
    for expert, first, count in zip(
        tiles.experts[active].tolist(), tiles.firsts[active].tolist(), tiles.counts[active].tolist(), strict=True
    ):
        assert 1 <= count <= tile
        found[expert] += tiles.pairs[first : first + count].tolist()
    assert found == expected
    assert (tiles.experts[~active] == -1).all()


def test_no_ids_need_more_tiles_than_there_are():
    for num_pairs in range(1, 40):
        for num_experts in (1, 2, 5):
            most = max(
                sum(-(-count // 4) for count in counts)
                for counts in ([num_pairs - others, *[1] * others] for others in range(min(num_experts, num_pairs)))
            )
            assert max_tiles(num_pairs, num_experts, 4) == most


def test_tiles_fit_the_tokens_of_an_expert():
    def chosen(num_tokens, form="fp4"):
        return moe.choose_tile(num_tokens, 6, 384, form)

    assert [chosen(tokens) for tokens in (1, 256, 682, 683, 2048, 8192)] == [16, 16, 16, 32, 64, 128]
    assert chosen(8192, "fp8") == chosen(8192, "bf16") == 64


@pytest.mark.parametrize(("change", "message"), [
    ({"activations": "int8"}, "activations is 'int8'; allowed: bf16, fp8, fp4"),
    ({"tile_tokens": 48}, r"tile_tokens is 48; allowed: \(16, 32, 64, 128\)"),
    ({"tile_tokens": 128}, "the last for the form 'fp4' only"),
    ({"x": torch.zeros(2, 128, dtype=torch.bfloat16)}, r"x is \[2, 128\], w13 \[E, 256, 256\]"),
    ({"x": torch.zeros(2, 256)}, "x is torch.float32.*expected bfloat16"),
    ({"expert_ids": torch.zeros(2, 2, dtype=torch.int64).t()}, "expert_ids has strides"),
])  # fmt: skip
def test_wrong_arguments_are_refused(change, message):
    inputs, _ = make(2)
    with pytest.raises(ValueError, match=message):
        moe.mega_moe(**(inputs | change))


@pytest.mark.parametrize(("activations", "form", "allowed"), [
    ("bf16", "fp4", "fp8, fp4"), ("bf16", "fp8", "fp8"), ("fp4", "fp8", "fp8"),
])  # fmt: skip
def test_activations_need_weights_of_a_form_for_them(activations, form, allowed):
    inputs, _ = make(2, activations=activations, form=form)
    with pytest.raises(ValueError, match=f"one form, for activations {allowed}$"):
        moe.mega_moe(**inputs)
