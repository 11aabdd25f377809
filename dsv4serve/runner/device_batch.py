"""One forward of the device engine, from raw per-request numbers to new tokens, without the host in between.

What the host knows of a step is one small array, the rows that `input_names` lists; everything else is computed on the
device, so the same code runs eagerly and inside a CUDA graph. The token a slot sampled last stays on the device, as its
next input, and behind it the drafts of a verify while the step runs.
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
from dsv4serve.runner.device_drafts import Drafter, Requests, judge
from dsv4serve.runner.device_step import PagedDeviceStep

INTEGERS = ("slot", "start", "count", "num_drafts", "top_k")  # one number of each for every request of a step
FLOATS = ("temperature", "top_p", "min_p")  # float64, in the bytes of an int64, as all that follow
LAST_TOKEN = -1  # in place of a token id: what the slot sampled last, in a verify's next rows its drafts


@dataclass(frozen=True)
class BatchOutput:
    """What a forward leaves on the device, one row per request of its bucket."""

    # int64 [requests, 1], the new token, -1 = its logits were NaN or infinite. With drafts [requests, 3 + drafts]: also
    # how many of them are accepted, of how many the logits were not finite, and the drafts.
    tokens: Tensor
    logits: Tensor  # float32 [requests, vocab], behind the last row of each request, or the last before its drafts
    rows: Streams | None  # of all rows, for the logits of prompt tokens, where they were to be kept


def input_names(num_drafts: int) -> tuple[str, ...]:
    """Names of a step's inputs: random numbers for the token behind so many drafts, to accept and to make each."""
    kinds = (("draw", num_drafts + 1), ("coin", num_drafts), ("draft", num_drafts))
    return INTEGERS + FLOATS + tuple(f"{kind}{place}" for kind, number in kinds for place in range(number))


def empty_inputs(num_requests: int, num_drafts: int, pinned: bool) -> Tensor:
    """int64 [inputs, num_requests] on the host, all requests empty."""
    inputs = torch.zeros(len(input_names(num_drafts)), num_requests, dtype=torch.int64, pin_memory=pinned)
    inputs[INTEGERS.index("slot")] = -1
    return inputs


def fill_inputs(inputs: Tensor, columns: dict[str, Sequence[int | float]]) -> None:
    """Write the numbers of a step's requests into the first places of `inputs`; the others are empty.

    `columns` has some of the inputs, in their order from "slot" on as far as it goes; what it lacks is 0.
    """
    values = inputs.numpy()
    values[:] = 0
    values[INTEGERS.index("slot")] = -1
    names = input_names((len(values) - len(input_names(0))) // (len(input_names(1)) - len(input_names(0))))
    for name, column in columns.items():
        kind = np.int64 if name in INTEGERS else np.float64
        values[names.index(name), : len(column)] = np.array(column, dtype=kind).view(np.int64)


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
        # One more, where padding is written to. Behind each last token there are drafts.
        self._tokens = torch.zeros(pools.num_slots + 1, 1 + most, dtype=torch.int64, device=self.device)
        self.page_table = torch.zeros(pools.num_slots, max_pages, dtype=torch.int32, device=self.device)
        # One for all steps: each graph having its own would take gigabytes. Behind each row and of each draft.
        num_logits = bucket_of(pools.num_slots) * (1 + 2 * most)
        shape = num_logits, transformer.config.vocab_size
        self._logits = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.drafter = None
        if most:
            assert transformer.mtp is not None, "drafts need an MTP block"
            self.drafter = Drafter(transformer.mtp, pools, self.page_table, self._tokens)

    def __call__(self, inputs: Tensor, token_ids: Tensor, keeps_rows: bool) -> BatchOutput:
        """Run the requests of `inputs` int64 [inputs, R], those with count 0 being padding, and sample for each.

        Args:
            token_ids: int64 [T], T at least the sum of counts: tokens of the rows, or LAST_TOKEN. With T = R x (1 + K),
                K being the most drafts that `inputs` has numbers for, no request has more than 1 + K rows.
        """
        requests = self._read(inputs)
        num_requests, num_drafts = requests.coins.shape
        buffer = self._logits[: num_requests * (1 + 2 * num_drafts)]
        behind, of_drafts = buffer.split([num_requests * (1 + num_drafts), num_requests * num_drafts])
        made = None
        if self.drafter is not None and num_drafts:
            made = self.drafter.propose(requests, of_drafts.view(num_requests, num_drafts, -1))
        rows = Rows.build(requests.slots, requests.starts, requests.counts, len(token_ids))
        token_ids = torch.where(token_ids == LAST_TOKEN, self._known(rows, num_drafts), token_ids)
        fits_rings = len(token_ids) == num_requests * (1 + num_drafts)
        step = PagedDeviceStep(self._pools, rows, self.page_table, fits_rings=fits_rings)
        streams = self.transformer(token_ids, step)
        sampling = None if len(token_ids) == num_requests else requests.sampling_rows(num_drafts).flatten()
        head, complete = self.transformer.head, None
        if self.drafter is None:
            x = head.collapse(streams if sampling is None else streams[sampling])[1]
        else:
            complete, x = head.collapse(streams)
            x = x if sampling is None else x[sampling]
        behind.copy_(head.logits(x))
        accepted = None
        if made is None:
            tokens, is_bad = sample(behind, **requests.settings, uniform=requests.draws[:, 0])
        else:
            accepted, tokens, is_bad = judge(buffer, requests, made.tokens)
        # Also of chunks that do not sample: what they leave is replaced before the slot's next decode.
        self._tokens[:, 0].index_copy_(0, requests.places, tokens)
        if self.drafter is not None and complete is not None:
            self.drafter.follow(requests, rows, token_ids, complete, made, accepted, fits_rings)
        results = torch.where(is_bad, -1, tokens).unsqueeze(1)
        if made is not None and accepted is not None:
            results = torch.cat([results, accepted.unsqueeze(1), made.num_wrong.unsqueeze(1), made.tokens], 1)
        logits = behind.view(num_requests, 1 + num_drafts, -1)[:, 0]
        return BatchOutput(results, logits, streams if keeps_rows else None)

    def _read(self, inputs: Tensor) -> Requests:
        """The inputs by name; padding has the spare place."""
        numbers = dict(zip(INTEGERS + FLOATS, inputs, strict=False))
        slots, starts, counts, num_drafts = (
            numbers[name].to(torch.int32) for name in ("slot", "start", "count", "num_drafts")
        )
        temperature, top_p, min_p = (numbers[name].view(torch.float64).float() for name in FLOATS)
        random = inputs[len(numbers) :].view(torch.float64)
        most = len(random) // 3
        draws, coins, drafts = (part.t().contiguous() for part in random.split([most + 1, most, most]))
        return Requests(
            slots=slots,
            places=torch.where(counts > 0, numbers["slot"], len(self._tokens) - 1),
            starts=starts,
            counts=counts,
            num_drafts=num_drafts,
            settings={"temperature": temperature, "top_k": numbers["top_k"], "top_p": top_p, "min_p": min_p},
            draws=draws,
            coins=coins,
            proposals=drafts,
        )

    def _known(self, rows: Rows, num_drafts: int) -> Tensor:
        """int64 [rows]: what the device knows to be the input of a decode's or a verify's rows."""
        places = torch.where(rows.slots < 0, len(self._tokens) - 1, rows.slots).long()
        if not num_drafts:
            return self._tokens[:, 0][places]
        behind = torch.arange(len(places), device=self.device) - rows.firsts  # the request's first row
        return self._tokens[places, behind.clamp(0, num_drafts)]

    def set_last_tokens(self, slots: list[int], token_ids: list[int]) -> None:
        """What these slots sampled was decided by the host."""
        index, values = self._send([slots, token_ids])
        self._tokens[:, 0].index_copy_(0, index, values)

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
