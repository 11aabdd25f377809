"""Expert parallelism where ranks write into each other's memory: GPUs that are linked, no host in between.

What exchange.py does, with fixed places instead of counts: a rank has room for `capacity` rows of every rank, a token's
row is where its number says, and rows that nobody sent have no experts. So nothing depends on data but what kernels
read, and a step can be captured in a CUDA graph. `capacity` is the step's bucket, the same on all ranks.

The way out is a kernel, the way back is in the second product, which stores an output where its token lives as soon as
it is there. Steps of a call, each rank for itself, with two barriers between all:

    dispatch | barrier | products | barrier | combine

A rank that is ahead cannot overwrite what another still reads: rows are read before the outputs that its last barrier
waits for, and outputs before the first barrier of the next call.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from dsv4_kernels.mega_moe import triton as moe
from dsv4_kernels.mega_moe.combine import combine
from dsv4_kernels.mega_moe.parallel import put
from dsv4_kernels.mega_moe.parallel.exchange import Traffic
from dsv4_kernels.mega_moe.parallel.expert_map import ExpertMap
from dsv4_kernels.mega_moe.parallel.wire import RowFormat
from dsv4_kernels.mega_moe.weights import Form, Fp4Weight

PLANE_ALIGNMENT = 256


class Memory(Protocol):
    """A buffer on every rank, of the same size."""

    mine: Tensor  # uint8
    addresses: Tensor  # int64 [ranks], of all ranks' buffers as this rank sees them

    def barrier(self) -> None:
        """On the current stream: everybody's writes before it are seen behind it."""


class SymmetricMemory:
    """torch's, over peer access. It would also make a multicast object, which nothing here uses: turned off."""

    def __init__(self, group: dist.ProcessGroup, num_bytes: int, device: torch.device) -> None:
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        from torch.distributed import _symmetric_memory as symmetric  # private and moving: nowhere else

        self.mine = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        self._handle: Any = symmetric.rendezvous(self.mine, group)
        self.addresses = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)

    def barrier(self) -> None:
        """See Memory."""
        self._handle.barrier(channel=0)


@dataclass(frozen=True)
class Planes:
    """Offsets in every rank's buffer: what came, by row, and what comes back, by pair of the rank's own tokens."""

    form: RowFormat
    num_ranks: int
    max_tokens: int
    values: int  # uint8 [rows, value_bytes]
    scales: int  # uint8 [rows, scale_bytes]
    slots: int  # int32 [rows, K]
    weights: int  # float32 [rows, K]
    outputs: int  # bfloat16 [tokens * K, D]
    num_bytes: int

    @classmethod
    def build(cls, form: RowFormat, num_ranks: int, max_tokens: int) -> Planes:
        """With room for `max_tokens` of every rank."""
        rows, places = num_ranks * max_tokens, 4 * form.top_k
        sizes = [rows * form.value_bytes, rows * form.scale_bytes, rows * places, rows * places]
        sizes.append(max_tokens * form.top_k * 2 * form.hidden_size)
        padded = [math.ceil(size / PLANE_ALIGNMENT) * PLANE_ALIGNMENT for size in sizes]
        return cls(form, num_ranks, max_tokens, *accumulate(padded, initial=0))


class SymmetricExperts:
    """The experts over linked ranks: the contract of `ExpertParallel.add_routed`, for `Fp4Weight`.

    Args:
        memory: `planes.num_bytes` on every rank; may serve all layers, one after the other.
        experts: on the device.
    """

    def __init__(self, rank: int, experts: ExpertMap, planes: Planes, memory: Memory) -> None:
        self.rank, self.experts, self.planes, self.memory = rank, experts, planes, memory
        self._counts = torch.zeros(2, dtype=torch.int64, device=memory.mine.device)
        self._num_calls = self._slot_bytes = 0

    @property
    def traffic(self) -> Traffic:
        """As of `ExpertParallel`; `count_bytes` are the slots of all rows, with tokens or without.

        Waits for the device. Replays of a graph show in the bytes of dispatch and combine only.
        """
        rows, pairs = self._counts.tolist()
        form = self.planes.form
        row_bytes = form.value_bytes + form.scale_bytes + 4 * form.top_k
        return Traffic(self._num_calls, self._slot_bytes, rows * row_bytes, pairs * 2 * form.hidden_size)

    def add_routed(
        self,
        shared: Tensor,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        w13: Fp4Weight,
        w2: Fp4Weight,
        *,
        limit: float,
        capacity: int,
        tile_tokens: int | None = None,
    ) -> Tensor:
        """bfloat16 [T, D]; a row without any expert is not written.

        Args:
            capacity: rows of this call for each rank, at least everybody's T and at most `planes.max_tokens`; the same
                on all ranks.
            tile_tokens: as in `triton.mega_moe`.

        Raises ValueError for a capacity that does not fit.
        """
        step = Step(self, x, expert_ids, weights, capacity)
        step.dispatch()
        self.memory.barrier()
        step.products(w13, w2, limit, tile_tokens)
        self.memory.barrier()
        return step.combine(shared)


class Step:
    """The parts of one call; `SymmetricExperts.add_routed` puts barriers between them."""

    def __init__(self, owner: SymmetricExperts, x: Tensor, expert_ids: Tensor, weights: Tensor, capacity: int) -> None:
        planes = owner.planes
        if not len(x) <= capacity <= planes.max_tokens:
            raise ValueError(
                f"SymmetricExperts: {len(x)} tokens, capacity {capacity}; expected a capacity of the tokens to "
                f"{planes.max_tokens}"
            )
        owner._num_calls += 1
        owner._slot_bytes += (planes.num_ranks - 1) * capacity * 4 * planes.form.top_k
        self._owner, self._ids, self._weights = owner, expert_ids, weights
        self._num_tokens, self._capacity = len(x), capacity
        self._num_rows = planes.num_ranks * capacity
        self._values, self._scales = planes.form.quantize(x)
        self._top = {"TOP_K": planes.form.top_k, "LANES": triton.next_power_of_2(planes.form.top_k)}

    def dispatch(self) -> None:
        """Write the tokens to the ranks of their experts."""
        owner, planes, experts = self._owner, self._owner.planes, self._owner.experts
        form = planes.form
        put.dispatch[(self._capacity, planes.num_ranks)](
            self._values.view(torch.int32), self._scales, self._ids, self._weights,
            experts.ranks, experts.slots, experts.num_copies, owner.memory.addresses, owner._counts,
            self._num_tokens, self._capacity, owner.rank,
            VALUES_AT=planes.values, SCALES_AT=planes.scales, SLOTS_AT=planes.slots, WEIGHTS_AT=planes.weights,
            WORDS=form.value_bytes // 4, SCALES=form.scale_bytes, COPIES=experts.ranks.shape[1], SIZE=put.BLOCK,
            SCALE_SIZE=triton.next_power_of_2(max(1, form.scale_bytes)), **self._top,
        )  # fmt: skip

    def products(self, w13: Fp4Weight, w2: Fp4Weight, limit: float, tile_tokens: int | None) -> None:
        """Write what this rank's experts say of the rows to the ranks of their tokens."""
        owner, planes, experts = self._owner, self._owner.planes, self._owner.experts
        num_slots = sum(map(len, experts.experts))  # of all ranks, over which the rows' pairs spread
        tile = tile_tokens or moe.choose_tile(self._num_rows, planes.form.top_k, num_slots, w13.form)
        moe.send_outputs(
            moe.Homes(owner.memory.addresses, planes.outputs, self._capacity), *self.received(w13.form), w13, w2,
            limit=limit, activations=planes.form.activations, tile_tokens=tile,
        )  # fmt: skip

    def received(self, weight_form: Form) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows that came: as the first product reads them and their scales, then expert slots and weights [rows, K]
        (see `triton.pair_outputs`)."""
        planes, form = self._owner.planes, self._owner.planes.form
        values = self._plane(planes.values, form.value_bytes)
        scales = self._plane(planes.scales, form.scale_bytes)
        slots = self._plane(planes.slots, 4 * form.top_k).view(torch.int32)
        weights = self._plane(planes.weights, 4 * form.top_k).view(torch.float32)
        if form.activations == "bf16":
            return values.view(torch.bfloat16), scales, slots, weights
        if weight_form != "bf16":
            return values, scales, slots, weights
        wide = torch.empty(self._num_rows, form.hidden_size, dtype=torch.bfloat16, device=values.device)
        put.widen[(self._num_rows, triton.cdiv(form.hidden_size, put.BLOCK))](
            values, scales, slots, wide,
            FP4=form.activations == "fp4", WIDTH=form.hidden_size, SIZE=put.BLOCK, **self._top,
        )  # fmt: skip
        return wide, scales, slots, weights

    def combine(self, shared: Tensor) -> Tensor:
        """Of the outputs that came back."""
        planes, form = self._owner.planes, self._owner.planes.form
        end = planes.outputs + self._num_tokens * form.top_k * 2 * form.hidden_size
        outputs = self._owner.memory.mine[planes.outputs : end].view(torch.bfloat16)
        return combine(outputs.view(self._num_tokens, form.top_k, form.hidden_size), shared, self._ids)

    def _plane(self, offset: int, row_bytes: int) -> Tensor:
        """The rows of a plane of this rank's buffer, uint8 [rows, row_bytes]."""
        size = self._num_rows * row_bytes
        return self._owner.memory.mine[offset : offset + size].view(self._num_rows, row_bytes)


def symmetric_experts(
    group: dist.ProcessGroup, experts: Sequence[Sequence[int]], num_experts: int, form: RowFormat, max_tokens: int
) -> SymmetricExperts:
    """Of this rank's current GPU, with memory of its own for `max_tokens` tokens of every rank."""
    device = torch.device("cuda", torch.cuda.current_device())
    planes = Planes.build(form, group.size(), max_tokens)
    memory = SymmetricMemory(group, planes.num_bytes, device)
    return SymmetricExperts(group.rank(), ExpertMap.build(experts, num_experts, device), planes, memory)
