"""One forward of the device engine, from raw per-request numbers to sampled tokens, without the host in between.

What the host knows of a step is one small array, INPUTS; everything else is computed on the device, so the same code
runs eagerly and inside a CUDA graph. The token a slot sampled last stays on the device, as its next input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv4_kernels.metadata import Rows
from dsv4_kernels.sampling.triton import sample
from dsv4serve.memory import CachePools
from dsv4serve.model.device import DeviceTransformer, Streams
from dsv4serve.runner.device_step import PagedDeviceStep

INTEGERS = ("slot", "start", "count", "top_k")  # one number of each for every request of a step
FLOATS = ("temperature", "top_p", "min_p", "uniform")  # float64, in the bytes of an int64
INPUTS = INTEGERS + FLOATS
LAST_TOKEN = -1  # in place of a token id: what the slot sampled last


@dataclass(frozen=True)
class BatchOutput:
    """What a forward leaves on the device, one row per request of its bucket."""

    tokens: Tensor  # int64 [requests]; -1 = its logits were NaN or infinite
    logits: Tensor  # float32 [requests, vocab], behind the last row of each request
    rows: Streams | None  # of all rows, for the logits of prompt tokens, where they were to be kept


def empty_inputs(num_requests: int, pinned: bool) -> Tensor:
    """INPUTS int64 [8, num_requests] on the host, all requests empty."""
    inputs = torch.zeros(len(INPUTS), num_requests, dtype=torch.int64, pin_memory=pinned)
    inputs[INPUTS.index("slot")] = -1
    return inputs


def fill_inputs(inputs: Tensor, columns: dict[str, Sequence[int | float]]) -> None:
    """Write the numbers of a step's requests into the first places of `inputs`; the others are empty."""
    values = inputs.numpy()
    values[:] = 0
    values[INPUTS.index("slot")] = -1
    for name, column in columns.items():
        kind = np.float64 if name in FLOATS else np.int64
        values[INPUTS.index(name), : len(column)] = np.array(column, dtype=kind).view(np.int64)


class DeviceForward:
    """The network over the cache, with what the device remembers of slots between steps.

    Args:
        transformer: on the device of `pools`.
        max_pages: pages of the longest request.
    """

    def __init__(self, transformer: DeviceTransformer, pools: CachePools, max_pages: int) -> None:
        self.transformer, self._pools = transformer, pools
        self.device = transformer.device
        # One more, where padding is written to.
        self._last_tokens = torch.zeros(pools.num_slots + 1, dtype=torch.int64, device=self.device)
        self.page_table = torch.zeros(pools.num_slots, max_pages, dtype=torch.int32, device=self.device)
        # One for all steps: each graph having its own would take gigabytes.
        vocab_size = transformer.config.vocab_size
        self._logits = torch.zeros(bucket_of(pools.num_slots), vocab_size, dtype=torch.float32, device=self.device)

    def __call__(self, inputs: Tensor, token_ids: Tensor, keeps_rows: bool) -> BatchOutput:
        """Run the requests of `inputs` int64 [8, R], those with count 0 being padding, and sample for each.

        Args:
            token_ids: int64 [T], T at least the sum of counts: tokens of the rows, or LAST_TOKEN. With T = R every
                request has one row or none.
        """
        numbers = dict(zip(INPUTS, inputs, strict=True))
        slots, starts, counts = (numbers[name].to(torch.int32) for name in ("slot", "start", "count"))
        rows = Rows.build(slots, starts, counts, len(token_ids))
        spare = len(self._last_tokens) - 1
        last = self._last_tokens[torch.where(rows.slots < 0, spare, rows.slots)]
        token_ids = torch.where(token_ids == LAST_TOKEN, last, token_ids)
        one_row_each = len(token_ids) == inputs.shape[1]
        step = PagedDeviceStep(self._pools, rows, self.page_table, fits_rings=one_row_each)
        streams = self.transformer(token_ids, step)
        sampling = streams
        if not one_row_each:
            sampling = streams[(counts.cumsum(0) - 1).clamp_min(0)]
        logits = self._logits[: inputs.shape[1]].copy_(self.transformer.logits(sampling))
        floats = {name: numbers[name].view(torch.float64) for name in FLOATS}
        tokens, is_bad = sample(
            logits,
            temperature=floats["temperature"].float(),
            top_k=numbers["top_k"],
            top_p=floats["top_p"].float(),
            min_p=floats["min_p"].float(),
            uniform=floats["uniform"],
        )
        # Also of chunks that do not sample: what they leave is replaced before the slot's next decode.
        self._last_tokens.index_copy_(0, torch.where(counts > 0, slots, spare).long(), tokens)
        return BatchOutput(torch.where(is_bad, -1, tokens), logits, streams if keeps_rows else None)

    def set_last_tokens(self, slots: list[int], token_ids: list[int]) -> None:
        """What these slots sampled was decided by the host."""
        index, values = self._send([slots, token_ids])
        self._last_tokens[index] = values

    def append_pages(self, places: list[int], pages: list[int]) -> None:
        """Write `pages` to the flat `places` of the page table."""
        index, values = self._send([places, pages])
        self.page_table.view(-1)[index] = values.int()

    def _send(self, values: list[list[int]]) -> Tensor:
        """To the device, without waiting for what it is doing."""
        pinned = torch.tensor(values, pin_memory=self.device.type == "cuda")
        return pinned.to(self.device, non_blocking=True)


def bucket_of(size: int) -> int:
    """The size that `size` is padded to: powers of two, from 256 on multiples of 256."""
    return 1 << max(size - 1, 0).bit_length() if size <= 256 else -(-size // 256) * 256
