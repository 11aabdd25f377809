"""The Gluon kernels of the experts, emulated on the CPU, against the Triton kernels, whose sums they have."""

import pytest
import torch
from support import gluon_emulator, triton_interpreter  # noqa: F401  # before any kernel
from support.experts import make
from support.poison import poisoned  # noqa: F401

from dsv4_kernels.mega_moe import hopper
from dsv4_kernels.mega_moe import triton as moe

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def emulated(monkeypatch):
    """Launches of the Gluon kernels, by few programs; the seed decides where their roles stop for a moment."""
    state = {"seed": 0, "launches": [], "elsewhere": []}

    class Kernel:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(hopper, name)

        def __getitem__(self, grid):
            def launch(*arguments, num_warps, launch_pdl, **constants):
                assert num_warps == 4
                state["launches"].append(self.name)
                gluon_emulator.launch(self.kernel, grid, arguments, constants, {}, state["seed"], state["elsewhere"])

            return launch

    for name in ("gate_up_specialized", "down_specialized"):
        monkeypatch.setattr(moe, name, Kernel(name))
    monkeypatch.setattr(moe, "is_hopper", lambda device: True)
    monkeypatch.setattr(moe, "num_multiprocessors", lambda device: 3)
    return state


def crowded(num_tokens, experts):
    """Inputs of `mega_moe` whose tokens all have the same experts."""
    inputs, _ = make(num_tokens, activations="fp8", form="fp8")
    inputs["expert_ids"] = torch.tensor([experts]).expand(num_tokens, -1).contiguous()
    return inputs


@pytest.fixture
def of_triton(monkeypatch):
    """`mega_moe` by the Triton kernels."""

    def run(inputs, tile_tokens=64):
        with monkeypatch.context() as patched:
            patched.setattr(moe, "is_hopper", lambda device: False)
            return moe.mega_moe(**inputs, tile_tokens=tile_tokens)

    return run


@pytest.mark.parametrize("num_tokens", [1, 64, 150])
def test_has_the_bits_of_the_triton_kernels(emulated, of_triton, num_tokens):
    """One pair, a full tile, three tiles of an expert of which the last is not full."""
    inputs = crowded(num_tokens, [7, 2])
    assert torch.equal(moe.mega_moe(**inputs, tile_tokens=64), of_triton(inputs))
    assert emulated["launches"] == ["gate_up_specialized", "down_specialized"]


def test_tokens_have_experts_of_their_own_or_none(emulated, of_triton):
    inputs, _ = make(30, activations="fp8", form="fp8")
    inputs["expert_ids"][[3, 29]] = -1
    found, expected = moe.mega_moe(**inputs, tile_tokens=64), of_triton(inputs)
    kept = [row for row in range(30) if row not in (3, 29)]
    assert torch.equal(found[kept], expected[kept])
    assert found[[3, 29]].isnan().all()  # nothing was written


def test_other_tiles_are_those_of_triton(emulated, of_triton):
    inputs = crowded(40, [3, 0])
    assert torch.equal(moe.mega_moe(**inputs, tile_tokens=32), of_triton(inputs, 32))
    assert emulated["launches"] == []


def test_more_programs_than_parts(emulated, of_triton, monkeypatch):
    inputs = crowded(5, [1, 4])
    monkeypatch.setattr(moe, "num_multiprocessors", lambda device: 9)
    assert torch.equal(moe.mega_moe(**inputs, tile_tokens=64), of_triton(inputs))


def test_outputs_go_where_their_tokens_live(emulated, monkeypatch):
    """Each of two ranks has half of the tokens, and room for their parts behind eight other values."""
    inputs = crowded(80, [4, 1])
    given = [*moe.rounded_inputs(inputs["x"], "fp8", "fp8"), *(inputs[name] for name in ("expert_ids", "weights"))]
    given += [inputs["w13"], inputs["w2"]]
    options = {"limit": inputs["limit"], "activations": "fp8", "tile_tokens": 64}
    hidden = inputs["x"].shape[1]
    ranks = [torch.full((8 + 40 * 2 * hidden,), 7.0, dtype=torch.bfloat16) for _ in range(2)]
    addresses = torch.tensor([gluon_emulator.ELSEWHERE, gluon_emulator.ELSEWHERE + gluon_emulator.SPACE])
    emulated["elsewhere"] = ranks
    moe.send_outputs(moe.Homes(addresses, 16, 40), *given, **options)
    monkeypatch.setattr(moe, "is_hopper", lambda device: False)
    expected = moe.pair_outputs(*given, **options)
    assert torch.equal(torch.cat([rank[8:] for rank in ranks]).view(-1, hidden), expected)
    assert all((rank[:8] == 7.0).all() for rank in ranks)


def test_roles_may_stop_anywhere(emulated):
    """The same bits whoever is ahead: what a role reads was written before, and is not written until it was read."""
    inputs = crowded(70, [5, 6])
    first = moe.mega_moe(**inputs, tile_tokens=64)
    for seed in range(1, 6):
        emulated["seed"] = seed
        assert torch.equal(moe.mega_moe(**inputs, tile_tokens=64), first)
