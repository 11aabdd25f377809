"""One forward of the device engine, from raw per-request numbers to new tokens, without the host in between.

What the host knows of a step is one small array, the rows of INPUTS; everything else is computed on the device, so the
same code runs eagerly and inside a CUDA graph. The token a slot sampled last stays on the device, as its next input,
and so does how many drafts it accepted: the next step begins behind them, whether the host has seen them or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv4_kernels.metadata import StepPlan
from dsv4_kernels.metadata.plan import INPUTS, INTEGERS, TOKEN
from dsv4_kernels.metadata.triton import end_step, plan_step
from dsv4_kernels.sampling.triton import sample
from dsv4serve.memory import CachePools
from dsv4serve.model.device import DeviceTransformer, Streams
from dsv4serve.runner.device_drafts import Drafter, MadeDrafts, judge
from dsv4serve.runner.device_step import PagedDeviceStep


@dataclass(frozen=True)
class BatchOutput:
    """What a forward leaves on the device, one row per request of its bucket."""

    # int64 [requests, 1], the new token, -1 = its logits were NaN or infinite. With drafts [requests, 3 + drafts]: also
    # how many of them are accepted, of how many the logits were not finite, and the drafts.
    tokens: Tensor
    logits: Tensor  # float32 [requests, vocab], behind the last row of each request, or the last before its drafts
    rows: Streams | None  # of all rows, for the logits of prompt tokens, where they were to be kept


def empty_inputs(num_requests: int, pinned: bool) -> Tensor:
    """int64 [INPUTS, num_requests] on the host, all requests empty."""
    inputs = torch.zeros(len(INPUTS), num_requests, dtype=torch.int64, pin_memory=pinned)
    inputs[INPUTS.index("slot")] = -1
    return inputs


def fill_inputs(inputs: Tensor, columns: dict[str, Sequence[int | float]]) -> None:
    """Write the numbers of a step's requests, by their names in INPUTS, into the first places of `inputs`; the others
    are empty."""
    values = inputs.numpy()
    values[:] = 0
    values[INPUTS.index("slot")] = -1
    for name, column in columns.items():
        kind = np.int64 if name in INTEGERS else np.float64
        values[INPUTS.index(name), : len(column)] = np.array(column, dtype=kind).view(np.int64)


class DeviceForward:
    """The network over the cache, with what the device remembers of slots between steps.

    Args:
        transformer: on the device of `pools`, with an MTP block if these have room for drafts.
        max_pages: pages of the longest request.
    """

    def __init__(self, transformer: DeviceTransformer, pools: CachePools, max_pages: int) -> None:
        self.transformer, self._pools = transformer, pools
        self.device = transformer.device
        most = pools.layout.num_draft_tokens
        # What steps leave of each slot, see metadata.plan. One slot more, where padding is written to.
        self.left = torch.zeros(2, pools.num_slots + 1, dtype=torch.int64, device=self.device)
        self.page_table = torch.zeros(pools.num_slots, max_pages, dtype=torch.int32, device=self.device)
        # One for all steps: each graph having its own would take gigabytes. Behind each row and of each draft.
        num_logits = bucket_of(pools.num_slots) * (1 + 2 * most)
        shape = num_logits, transformer.config.vocab_size
        self._logits = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.drafter = None
        if most:
            assert transformer.mtp is not None, "drafts need an MTP block"
            self.drafter = Drafter(transformer.mtp, pools, self.page_table)

    def __call__(self, inputs: Tensor, token_ids: Tensor, num_drafts: int, keeps_rows: bool) -> BatchOutput:
        """Run the requests of `inputs` int64 [INPUTS, R], those with count 0 being padding, and sample for each.

        Args:
            token_ids: int64 [T], T at least the sum of counts: tokens of the rows, or LAST_TOKEN. With T = R x (1 + K)
                no request has more than 1 + K rows.
            num_drafts: K, the most of a request.
        """
        plan = plan_step(inputs, token_ids, self.left, num_drafts)
        num_requests = inputs.shape[1]
        buffer = self._logits[: num_requests * (1 + 2 * num_drafts)]
        made: MadeDrafts | None = None
        beside: AbstractContextManager[None] = nullcontext()
        if self.drafter is not None and num_drafts:
            of_drafts = buffer[num_requests * (1 + num_drafts) :]
            made = self.drafter.propose(plan, of_drafts.view(num_requests, num_drafts, -1))
        elif self.drafter is not None and len(token_ids) == num_requests:
            beside = self.drafter.beside(plan)
        with beside:
            results, streams = self._forward(plan, made, buffer)
        logits = buffer[: num_requests * (1 + num_drafts)].view(num_requests, 1 + num_drafts, -1)[:, 0]
        return BatchOutput(results, logits, streams if keeps_rows else None)

    def _forward(self, plan: StepPlan, made: MadeDrafts | None, buffer: Tensor) -> tuple[Tensor, Streams]:
        """The main model over the plan's rows, their tokens, and what the next step goes on from.

        buffer: f32 [R (2 K + 1), vocab], where the logits go to. Returns `BatchOutput.tokens` and the rows' streams.
        """
        num_rows, num_requests, num_drafts = len(plan.ids), len(plan.slots), plan.coins.shape[1]
        behind = buffer[: num_requests * (1 + num_drafts)]
        fits_rings = num_rows == num_requests * (1 + num_drafts)
        step = PagedDeviceStep(self._pools, plan.rows, self.page_table, fits_rings=fits_rings)
        streams = self.transformer(plan.ids, step)
        sampling = None if num_rows == num_requests else plan.sampling_rows.flatten()
        head, complete = self.transformer.head, None
        if self.drafter is None:
            x = head.collapse(streams if sampling is None else streams[sampling])[1]
        else:
            complete, x = head.collapse(streams)
            x = x if sampling is None else x[sampling]
        head.logits(x, out=behind)
        accepted = None
        if made is None:
            tokens, is_bad = sample(behind, **plan.judged, uniform=plan.shares)
        else:
            accepted, tokens, is_bad = judge(buffer, plan, made.tokens)
        # Also of chunks that do not sample: what they leave is replaced before the slot's next decode.
        drafts, num_banks = None if made is None else made.tokens, self._pools.layout.c128_banks
        results, ends, banks = end_step(plan, self.left, tokens, is_bad, num_banks, accepted, drafts)
        if self.drafter is not None and complete is not None:
            self.drafter.follow(plan, complete, made, ends, banks, fits_rings)
        return results, streams

    def set_last_tokens(self, slots: list[int], token_ids: list[int]) -> None:
        """What these slots sampled was decided by the host."""
        index, values = self._send([slots, token_ids])
        self.left[TOKEN].index_copy_(0, index, values)

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
