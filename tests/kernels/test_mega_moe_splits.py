"""Tiles of `gate_up` that several programs share, by the interpreter on the CPU."""

import dataclasses
import random

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.experts import make
from support.poison import poisoned  # noqa: F401
from triton.runtime import interpreter

from dsv4_kernels.arrival import NUM_COUNTERS, counters
from dsv4_kernels.cases import EDGE, FLASH, PRO
from dsv4_kernels.deterministic import deterministic
from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.mega_moe import reference
from dsv4_kernels.mega_moe import triton as moe
from dsv4_kernels.mega_moe.tiles import make_tiles, max_tiles
from dsv4_kernels.mega_moe.weights import relayout
from dsv4_kernels.quant.reference import quantize_fp4_weight, quantize_fp8_blocks

FORMS = [("bf16", "bf16"), ("fp8", "bf16"), ("fp8", "fp8"), ("fp8", "fp4"), ("fp4", "bf16"), ("fp4", "fp4")]
BOUND = 1e-3  # relative norm: that of the experts without splits
# Of Pro seven blocks of K, which neither 2, 3 nor 4 divide, of Flash four; three and two columns.
SMALL_PRO = dataclasses.replace(PRO, hidden_size=896, moe_intermediate_size=384, n_routed_experts=7)
SMALL_FLASH = dataclasses.replace(FLASH, hidden_size=512, moe_intermediate_size=256, n_routed_experts=8)
pytestmark = pytest.mark.usefixtures("poisoned")


def force(monkeypatch, splits):
    monkeypatch.setattr(moe, "splits_for", lambda form, num_programs, num_blocks: splits)


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found.double() - expected.double()).norm() <= BOUND * expected.double().norm()


@pytest.mark.parametrize(("activations", "form"), FORMS)
@pytest.mark.parametrize(("shapes", "splits"), [
    (SMALL_PRO, 2), (SMALL_PRO, 3), (SMALL_PRO, 4), (SMALL_FLASH, 2), (SMALL_FLASH, 4), (EDGE, 4),
])  # fmt: skip
def test_equals_the_reference(monkeypatch, shapes, splits, activations, form):
    """Of EDGE, three blocks of K, the last split has nothing of its own."""
    force(monkeypatch, splits)
    inputs, given = make(2, shapes, activations, form)
    assert_close(moe.mega_moe(**inputs), reference.mega_moe(**given))
    assert not counters(inputs["x"].device, NUM_COUNTERS).any()


@pytest.mark.parametrize(("activations", "form"), [("bf16", "bf16"), ("fp8", "fp8"), ("fp4", "fp4")])
def test_several_tiles_of_an_expert_and_of_the_shared_one(monkeypatch, activations, form):
    force(monkeypatch, 2)
    inputs, given = make(40, EDGE, activations, form)
    inputs["expert_ids"] = given["expert_ids"] = torch.tensor([[3, 0, 4]]).expand(40, -1).contiguous()
    assert_close(moe.mega_moe(**inputs, tile_tokens=16), reference.mega_moe(**given))
    assert not counters(inputs["x"].device, NUM_COUNTERS).any()


@pytest.mark.parametrize(("activations", "form"), [("bf16", "bf16"), ("fp8", "fp8"), ("fp8", "fp4"), ("fp4", "fp4")])
def test_parts_are_added_in_the_order_of_k(monkeypatch, activations, form):
    """A large number, its opposite and one: their sum is one in this order alone, and what is small is lost in others.

    For routed experts and the shared one, whose weights are all one half.
    """
    force(monkeypatch, 3)
    inputs, given = make(3, EDGE, activations, form)
    inputs["limit"] = given["limit"] = 10.0
    for name in ("w13", "w2"):
        given[name] = torch.full_like(given[name], 0.5)
        inputs[name] = relayout(*quantize_fp4_weight(given[name]), form=form)
        name = f"shared_{name}"
        given[name] = torch.full_like(given[name], 0.5)
        inputs[name] = Fp8Weight.from_checkpoint(*quantize_fp8_blocks(given[name]))
    given["x"] = torch.zeros(3, 384, dtype=torch.bfloat16)
    given["x"][:, 300] = torch.tensor([1.0, 2.0, 4.0])
    inputs["x"] = given["x"].clone()
    inputs["x"][:, 7], inputs["x"][:, 200] = 2.0**30, -(2.0**30)
    assert_close(moe.mega_moe(**inputs), reference.mega_moe(**given))


@pytest.mark.parametrize(("activations", "form"), [("bf16", "bf16"), ("fp8", "fp8"), ("fp4", "fp4")])
def test_padding_and_nan_change_no_other_row(monkeypatch, activations, form):
    """Tiles without an expert count no program, and the next launch finds zeros again."""
    force(monkeypatch, 3)
    inputs, _ = make(6, SMALL_PRO, activations, form)
    complete = moe.mega_moe(**inputs)
    assert torch.equal(moe.mega_moe(**inputs), complete)
    inputs["expert_ids"] = inputs["expert_ids"].clone()
    inputs["expert_ids"][[1, 5]] = -1
    inputs["x"] = inputs["x"].clone()
    inputs["x"][[1, 5]] = torch.inf
    inputs["x"][3, 600] = torch.nan
    assert (make_tiles(inputs["expert_ids"], 7, 16).experts < 0).any()
    found = moe.mega_moe(**inputs)
    assert found[[1, 3, 5]].isnan().all()  # 1 and 5 as poisoned: nothing was written
    assert torch.equal(found[[0, 2, 4]], complete[[0, 2, 4]])
    assert not counters(inputs["x"].device, NUM_COUNTERS).any()


@pytest.mark.parametrize(("activations", "form"), [("fp8", "fp8"), ("fp4", "fp4")])
def test_bits_do_not_depend_on_which_program_comes_when(monkeypatch, activations, form):
    """Splits of all tiles in turn, and some last that are not the last of K."""
    force(monkeypatch, 3)
    inputs, _ = make(3, SMALL_PRO, activations, form)
    expected, original = moe.mega_moe(**inputs), interpreter.InterpreterBuilder.set_grid_idx

    def shuffled(builder, x, y, z):
        order = list(range(builder.grid_dim[1]))
        random.Random(len(order)).shuffle(order)
        original(builder, x, order[y], z)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", shuffled)
    assert torch.equal(moe.mega_moe(**inputs), expected)
    assert not counters(inputs["x"].device, NUM_COUNTERS).any()


def refuse(*_):
    raise AssertionError("nobody should ask")


def test_large_tiles_ranks_and_deterministic_mode_have_no_splits(monkeypatch):
    monkeypatch.setattr(moe, "splits_for", refuse)
    inputs, _ = make(2, EDGE)
    moe.mega_moe(**inputs, tile_tokens=32)
    with deterministic():
        moe.mega_moe(**inputs, tile_tokens=16)
    names = ("expert_ids", "weights", "w13", "w2", "limit", "activations")
    rows = moe.rounded_inputs(inputs["x"], "fp8", "fp8")
    moe.pair_outputs(*rows, **{name: inputs[name] for name in names}, tile_tokens=16)
    with pytest.raises(AssertionError):
        moe.mega_moe(**inputs, tile_tokens=16)


@pytest.mark.parametrize(("shapes", "expected"), [(PRO, [3, 2, 1, 1]), (FLASH, [4, 2, 2, 1])])
def test_few_tokens_have_splits(shapes, expected):
    columns, blocks = shapes.moe_intermediate_size // 128, shapes.hidden_size // 128

    def splits(num_tokens, form="fp8"):
        tiles = 1 + max_tiles(num_tokens * shapes.num_experts_per_tok, shapes.n_routed_experts, 16)
        return moe.splits_for(form, columns * tiles, blocks)

    assert [splits(num_tokens) for num_tokens in (1, 2, 3, 4)] == expected
    assert splits(64) == splits(1, "bf16") == 1
    assert moe.splits_for("fp4", 2, 3) == 3  # not more than blocks of K
