"""The Gluon kernel of sparse attention against the reference, emulated on the CPU, and beside the Triton kernel."""

import pytest
import torch
from support import gluon_emulator, triton_interpreter  # noqa: F401  # before any kernel

from dsv4_kernels import capability
from dsv4_kernels.cases import DEMO, FLASH, PRO
from dsv4_kernels.sparse_attention import hopper, triton
from dsv4_kernels.sparse_attention.cases import Case
from dsv4_kernels.sparse_attention.triton import sparse_attention

BOUND = 3e-3  # as of the Triton kernel
REQUESTS = ((0, 1), (0, 3), (9_000, 1), (127, 2), (300, 5))


def widen(words, factor):
    """What WIDEN does: [keys, n] of four codes each to two words of two bf16 each."""
    codes = words.contiguous().view(torch.uint8).unflatten(1, (-1, 4)).view(torch.float8_e4m3fn)
    values = (codes.float() * factor[..., None]).bfloat16().contiguous()
    return values.view(torch.int32).unbind(-1)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Launches of the Gluon kernel; the seed decides where its roles stop for a moment."""
    state = {"seed": 0, "launches": 0}

    class Kernel:
        def __getitem__(self, grid):
            def launch(*arguments, num_warps, launch_pdl, **constants):
                assert num_warps == 8
                state["launches"] += 1
                assembler = {hopper.WIDEN.value: widen, hopper.FETCH.value: lambda lines: ()}
                gluon_emulator.launch(hopper.attend_specialized, grid, arguments, constants, assembler, state["seed"])

            return launch

    monkeypatch.setattr(triton, "attend_specialized", Kernel())
    return state


def relative_error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def run(inputs, **arguments):
    out = torch.full(inputs["q"].shape, 7.0, dtype=torch.bfloat16)
    return sparse_attention(**inputs, out=out, specialized=True, **arguments)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(("ratio", "top_k"), [(0, 0), (4, 200), (128, 0)])
def test_every_kind_of_layer_equals_the_reference(emulated, ratio, top_k, num_splits):
    case = Case("flash", FLASH, REQUESTS, num_padding=2, num_drafts=3, ratio=ratio, top_k=top_k)
    inputs = case.make(0)
    out = run(inputs, num_splits=num_splits)
    assert relative_error(out[: case.num_tokens], case.reference(inputs)) <= BOUND
    assert (out[case.num_tokens :] == 7.0).all()
    assert emulated["launches"] == 1


def test_every_tile_of_heads_is_its_own():
    case = Case("pro", PRO, ((131, 2),), num_padding=1, ratio=4, top_k=40)
    inputs = case.make(1)
    assert relative_error(run(inputs)[:2], case.reference(inputs)) <= BOUND


def test_roles_may_stop_anywhere(emulated):
    """The same bits whoever is ahead: what a role reads was written before, and is not written until it was read."""
    inputs = Case("flash", FLASH, ((2_000, 1),), ratio=4, top_k=300).make(2)
    first = run(inputs, num_splits=1)
    for seed in range(1, 6):
        emulated["seed"] = seed
        assert torch.equal(run(inputs, num_splits=1), first)


def test_it_equals_the_triton_kernel():
    """Keys, their order and the blocks are the same; the sum of weights is taken in another order."""
    inputs = Case("flash", FLASH, ((700, 2),), ratio=4, top_k=100).make(3)
    expected = sparse_attention(**inputs, num_splits=1, specialized=False)
    found = run(inputs, num_splits=1)
    assert relative_error(found, expected) <= 3e-4
    assert (found == expected).float().mean() >= 0.98


@pytest.mark.parametrize("num_splits", [1, 2])
def test_nan_stays_in_its_row(num_splits):
    inputs = Case("flash", FLASH, ((60, 1), (300, 2)), ratio=4, top_k=64).make(6)
    inputs["q"][1, 3, 5] = torch.nan
    out = run(inputs, num_splits=num_splits)
    assert out[1, 3].isnan().all()
    out[1, 3] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("sink", [-torch.inf, 1e4])
def test_extreme_sinks(sink):
    case = Case("flash", FLASH, ((3, 2),), ratio=4)
    inputs = case.make(7)
    inputs["sink"][:4] = sink
    assert relative_error(run(inputs, num_splits=2), case.reference(inputs)) <= BOUND


@pytest.mark.parametrize(("shapes", "is_hopper", "launches"), [(FLASH, True, 1), (FLASH, False, 0), (DEMO, True, 0)])
def test_hopper_takes_it_for_heads_that_fill_tiles(emulated, monkeypatch, shapes, is_hopper, launches):
    monkeypatch.setattr(capability, "is_hopper", lambda device: is_hopper)
    case = Case("any", shapes, ((3, 1),))
    inputs = case.make(8)
    assert relative_error(sparse_attention(**inputs), case.reference(inputs)) <= BOUND
    assert emulated["launches"] == launches


def test_heads_that_fill_no_tile_are_refused():
    inputs = Case("demo", DEMO, ((3, 1),)).make(0)
    with pytest.raises(
        ValueError, match=r"q is \[1, 8, 128\], its .* warps with roles take multiples of 64 heads of 512 in"
    ):
        run(inputs)


def test_rows_of_queries_that_cannot_be_copied_at_once_go_to_triton(emulated, monkeypatch):
    monkeypatch.setattr(capability, "is_hopper", lambda device: True)
    case = Case("flash", FLASH, ((3, 2),))
    inputs = case.make(9)
    wider = torch.zeros(2, inputs["q"][0].numel() + 8, dtype=torch.bfloat16)
    q = wider[:, :-8].unflatten(1, inputs["q"].shape[1:])
    q.copy_(inputs["q"])
    assert relative_error(sparse_attention(**inputs | {"q": q}), case.reference(inputs)) <= BOUND
    assert emulated["launches"] == 0
    with pytest.raises(ValueError, match="its rows 32776 values apart"):
        run(inputs | {"q": q})
