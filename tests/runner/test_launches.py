"""What a layer of Pro and a step around it launch, and what memory its rows take; nothing is computed.

Every launch of a step that is bound by memory costs a microsecond or two (docs/adr/0007), so the number is held.
"""

import collections
import ctypes
import dataclasses

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.pro_network import NUM_EXPERTS, RATIOS, pro_network
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from dsv4_kernels.deterministic import deterministic
from dsv4_kernels.metadata import Rows
from dsv4serve.config import Numerics
from dsv4serve.memory import CacheLayout, CachePools
from dsv4serve.memory.activations import SCORE_BYTES, row_bytes, step_bytes
from dsv4serve.model.device import Streams
from dsv4serve.runner.device_batch import DeviceForward, empty_inputs
from dsv4serve.runner.device_step import PagedDeviceStep

DETERMINISTIC = {4: 24, 128: 21}  # launches of a layer in deterministic mode
PAGES = 32  # of a request: 8K tokens


class Launches(TorchDispatchMode):
    """Counts kernels by name while it is active: Triton's, which do nothing then, and torch's."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = names = collections.Counter()
        self.storages, self.most_bytes = {}, 0

        def run(kernel, *args, **kwargs):
            names[kernel.fn.__name__] += 1

        monkeypatch.setattr(InterpretedFunction, "run", run)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and "empty" not in name:
            self.names[name] += 1
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
            alive = sum(size for reference, size in self.storages.values() if not reference.expired())
            self.most_bytes = max(self.most_bytes, alive)
        return result


@pytest.fixture(scope="module")
def network():
    return pro_network()


def run_layer(network, monkeypatch, ratio: int, counts: list[int]) -> Launches:
    """A block of the network over a step of requests with so many rows each, at position 8,000."""
    pools = CachePools(CacheLayout.build(network.config, Numerics.OFFICIAL), 1, 1, 1, "cpu")
    each = torch.tensor(counts, dtype=torch.int32)
    num_rows = sum(counts)
    rows = Rows.build(each * 0, each * 0 + 8000, each, num_rows)
    page_table = torch.zeros(1, PAGES, dtype=torch.int32)
    step = PagedDeviceStep(pools, rows, page_table, fits_rings=set(counts) == {1})
    block = network.blocks[RATIOS.index(ratio)]
    launches = Launches(monkeypatch)

    def run():
        streams = torch.zeros(num_rows, 4, network.config.hidden_size, dtype=torch.bfloat16)
        output = torch.zeros(num_rows, 7, network.config.hidden_size, dtype=torch.bfloat16)
        before = Streams(streams, output, torch.zeros(num_rows, 4), torch.zeros(num_rows, 4, 4))
        ids = torch.zeros(num_rows, dtype=torch.int64)
        launches.names.clear()
        return block(before, ids, step)

    with torch.inference_mode():
        run()  # what a step computes once for all layers
        with launches:
            run()
    return launches


@pytest.mark.parametrize(
    ("ratio", "num_requests", "most"),
    [
        (4, 1, 12),
        (4, 8, 14),  # both hyper-connections in two launches
        (4, 64, 15),  # no partial attention, but queries and what stands beside them in launches of their own
        (128, 1, 10),  # 11 where a request may have more than 8K tokens: parts of attention are added then
        (128, 8, 12),
        (128, 64, 14),
    ],
)
def test_a_layer_of_a_decode_step_has_few_launches(network, monkeypatch, ratio, num_requests, most):
    launches = run_layer(network, monkeypatch, ratio, [1] * num_requests)
    assert sum(launches.names.values()) <= most, launches.names
    with deterministic():
        launches = run_layer(network, monkeypatch, ratio, [1] * num_requests)
    assert sum(launches.names.values()) <= DETERMINISTIC[ratio], launches.names


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_memory_plan_holds_what_a_step_allocates(network, monkeypatch, ratio, is_deterministic):
    num_rows = 512
    with deterministic(is_deterministic):
        found = run_layer(network, monkeypatch, ratio, [num_rows]).most_bytes
    planned = num_rows * row_bytes(dataclasses.replace(network.config, n_routed_experts=NUM_EXPERTS))
    assert 0.5 * planned < found <= planned + SCORE_BYTES


def run_step(network, monkeypatch, num_draft_tokens: int, num_rows: int, num_drafts: int = 0) -> Launches:
    """A step of one request in an engine with room for so many drafts."""
    pools = CachePools(CacheLayout.build(network.config, Numerics.OFFICIAL, num_draft_tokens), 1, PAGES, 1, "cpu")
    forward = DeviceForward(network, pools, PAGES)
    inputs, ids = empty_inputs(1, pinned=False), torch.zeros(num_rows, dtype=torch.int64)
    # What kernels would write that do nothing must be valid indices; the memory is not cleared by a launch.
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *size, **settings: cleared(empty(*size, **settings)))
    monkeypatch.setattr(torch, "empty_like", lambda *given, **settings: cleared(empty_like(*given, **settings)))
    launches = Launches(monkeypatch)
    with torch.inference_mode(), launches:
        forward(inputs, ids, num_drafts, keeps_rows=False)
    return launches


def cleared(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros that no operation of torch made."""
    if tensor.numel():
        ctypes.memset(tensor.data_ptr(), 0, tensor.untyped_storage().nbytes())
    return tensor


def test_drafts_cost_a_step_few_launches(network, monkeypatch):
    """Of a decode: the block's keys and the streams. Of a verify: a pass of the block for each draft, and judging."""
    without, decode, one, two = (
        sum(run_step(network, monkeypatch, room, 1 + num, num).names.values())
        for room, num in ((0, 0), (2, 0), (2, 1), (2, 2))
    )
    assert without <= 32
    assert decode - without <= 10  # all but two, which load and store the streams, run beside the main model's
    assert two - one <= 26  # six of them are the main model's: mHC of three rows has a launch more than of two
    assert one - decode <= 29


def test_the_memory_plan_holds_what_a_step_with_drafts_allocates(network, monkeypatch):
    num_rows = 512
    found = run_step(network, monkeypatch, 2, num_rows, 2).most_bytes
    model = dataclasses.replace(network.config, n_routed_experts=NUM_EXPERTS)
    planned = step_bytes(model, num_rows, num_requests=1, num_draft_tokens=2)
    assert 0.5 * (planned - SCORE_BYTES) < found <= planned
