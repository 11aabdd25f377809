"""Drafts on the device: made, judged, and the MTP block brought up to where the main model is.

The contract is that of `speculative.MtpChain` and `speculative.judge`: the block stands one position behind the main
model, and a slot keeps the main model's streams of its last position for it. Here every request of a step has a row in
each pass of the block, padding where it has no such draft, so that shapes do not depend on numbers of drafts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.metadata import Rows
from dsv4_kernels.sampling import LOWEST
from dsv4_kernels.sampling.triton import sample
from dsv4_kernels.spec_accept.triton import accept
from dsv4serve.memory import CachePools
from dsv4serve.model.device import DeviceMtp
from dsv4serve.runner.device_step import PagedDeviceStep


@dataclass(frozen=True)
class Requests:
    """The R requests of a step on the device; K is the most drafts that one may have."""

    slots: Tensor  # int32 [R], -1 = padding
    places: Tensor  # int64 [R], the same with one more slot for padding
    starts: Tensor  # int32 [R], positions that are computed
    counts: Tensor  # int32 [R], rows of the step, drafts included
    num_drafts: Tensor  # int32 [R]
    settings: dict[str, Tensor]  # arguments of `sample`, [R] each
    draws: Tensor  # float64 [R, K + 1]: random numbers for the token behind 0 to K drafts,
    coins: Tensor  # float64 [R, K]: to accept each draft,
    proposals: Tensor  # float64 [R, K]: and to make it

    @property
    def first_rows(self) -> Tensor:
        """int64 [R], each request's first row in the step."""
        return self.counts.cumsum(0) - self.counts

    def sampling_rows(self, num_drafts: int) -> Tensor:
        """int64 [R, num_drafts + 1]: the rows behind 0 to so many drafts; beyond a request's last one that is
        repeated."""
        last = (self.first_rows + self.counts - self.num_drafts - 1).clamp_min(0).unsqueeze(1)
        drafts = torch.arange(num_drafts + 1, device=last.device)
        return last + torch.minimum(drafts, self.num_drafts.unsqueeze(1))


@dataclass(frozen=True)
class MadeDrafts:
    """The drafts of a step."""

    tokens: Tensor  # int64 [R, K], -1 where a request has none
    num_wrong: Tensor  # int64 [R]: of how many the logits had NaN or infinite values
    streams: Tensor  # bf16 [R, c, hidden] of the main model at each slot's last position


class Drafter:
    """Makes drafts and keeps the block's cache up to date.

    Args:
        mtp: the block.
        pools: a cache with room for drafts.
        page_table: int32 [slots, pages], which the block does not read.
        tokens: int64 [slots + 1, 1 + K]: each slot's last token; drafts are written behind it.
    """

    def __init__(self, mtp: DeviceMtp, pools: CachePools, page_table: Tensor, tokens: Tensor) -> None:
        self._mtp, self._pools, self._page_table, self._tokens = mtp, pools, page_table, tokens

    def propose(self, requests: Requests, logits: Tensor) -> MadeDrafts:
        """Make the step's drafts and write what they were drawn from to float32 `logits` [R, K, vocab], finite."""
        stored = streams = self._stored(requests)
        ids, made, wrong = self._tokens[:, 0][requests.places], [], []
        num_requests, num_drafts = logits.shape[:2]
        firsts = torch.arange(num_requests, device=logits.device, dtype=torch.int32)
        counts = torch.ones_like(firsts)
        for place in range(num_drafts):
            has_draft = requests.num_drafts > place
            rows = Rows(
                slots=torch.where(has_draft, requests.slots, -1),
                positions=torch.where(has_draft, requests.starts - 1 + place, -1),
                firsts=firsts,
                counts=counts,
            )
            step = PagedDeviceStep(self._pools, rows, self._page_table, fits_rings=True)
            streams, x = self._mtp.head.collapse(self._mtp.advance(streams, ids, step))
            own = self._mtp.head.logits(x)
            wrong.append(has_draft & ~torch.isfinite(own).all(1))
            # A broken MTP block must cost speed, not answers: any proposal is as exact as any other.
            own = logits[:, place].copy_(own.nan_to_num_(LOWEST, LOWEST, LOWEST))
            ids = self._choose(place, own, requests)
            self._tokens[:, 1 + place].index_copy_(0, requests.places, ids)
            made.append(torch.where(has_draft, ids, -1))
        return MadeDrafts(torch.stack(made, 1), torch.stack(wrong, 1).sum(1), stored)

    def _choose(self, place: int, logits: Tensor, requests: Requests) -> Tensor:
        """The drafts int64 [R] at `place`: greedy requests take the best, others draw with their own settings."""
        return sample(logits, **requests.settings, uniform=requests.proposals[:, place].contiguous())[0]

    def follow(
        self,
        requests: Requests,
        rows: Rows,
        token_ids: Tensor,
        streams: Tensor,
        made: MadeDrafts | None,
        accepted: Tensor | None,
        fits_rings: bool,
    ) -> None:
        """Bring the block's keys up to where the main model is, and commit what each request goes on from.

        Keys of rows that do not stay are written too: they lie where those of the next step will.

        Args:
            rows, token_ids: of the main model's step.
            streams: bf16 [rows, c, hidden] that it left.
            made, accepted: the step's drafts, and int64 [R] how many of them stay; None where it has none.
            fits_rings: see PagedDeviceStep.
        """
        before = self._stored(requests) if made is None else made.streams
        last = streams
        if len(streams) > len(before):
            firsts, kept = requests.first_rows, requests.counts
            if accepted is not None:
                kept = kept - requests.num_drafts + accepted
            last = streams[(firsts + kept - 1).clamp_min(0)]
            # Each row takes the streams of the row before it, the first of a request what was stored.
            shifted = torch.empty(len(streams) + 1, *streams.shape[1:], dtype=streams.dtype, device=streams.device)
            shifted[1:] = streams
            shifted.index_copy_(0, torch.where(requests.counts > 0, firsts, len(streams)), before)
            before = shifted[:-1]
            num_banks = self._pools.layout.c128_banks
            banks = torch.where(requests.counts <= num_banks, kept - 1, 0).clamp_min(0)
            self._pools.commit(requests.places, banks.long())
        behind = Rows(rows.slots, rows.positions - 1, rows.firsts, rows.counts)
        step = PagedDeviceStep(self._pools, behind, self._page_table, fits_rings=fits_rings)
        self._mtp.keep(before, token_ids, step)
        self._pools.store_streams(requests.places, last)

    def _stored(self, requests: Requests) -> Tensor:
        """bf16 [R, c, hidden]."""
        return self._pools.load_streams(requests.places, self._mtp.config.hc_mult, torch.bfloat16)


def judge(logits: Tensor, requests: Requests, drafts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Accept or reject the `drafts` int64 [R, K], -1 = none, K >= 1.

    Args:
        logits: float32 [R * (2 K + 1), vocab]: of the main model behind 0 to K drafts of each request, then of what the
            drafts were drawn from.

    Returns int64 [R] how many are accepted, int64 [R] the token after them, and bool [R] whether logits of the main
    model were NaN or infinite. The token of a request without drafts is what `sample` draws for it.
    """
    num_requests, most = drafts.shape
    target, proposal = logits.split([num_requests * (most + 1), num_requests * most])

    def each(values: Tensor, *more: Tensor) -> Tensor:
        """Repeated for all rows of `logits`; `more` is for those of the drafts."""
        parts = (values.unsqueeze(1).expand(-1, most + 1), (more or (values,))[0].unsqueeze(1).expand(-1, most))
        return torch.cat([part.reshape(-1) for part in parts])

    settings = requests.settings
    has_none = requests.num_drafts == 0
    # The random number 1 gives the last token that filters keep.
    shares = torch.where(has_none, requests.draws[:, 0], 1.0)
    repeated = {name: each(value) for name, value in settings.items()}
    lasts, is_bad = sample(logits, **repeated, uniform=each(shares, torch.ones_like(shares)))
    target_lasts, proposal_lasts = (
        part.unflatten(0, (num_requests, -1)) for part in lasts.split([len(target), len(proposal)])
    )
    is_filtered = (settings["top_k"] > 0) | (settings["top_p"] < 1) | (settings["min_p"] > 0)
    accepted, tokens = accept(
        target.unflatten(0, (num_requests, -1)),
        target_lasts,
        proposal.unflatten(0, (num_requests, -1)),
        proposal_lasts,
        drafts,
        temperature=settings["temperature"],
        is_filtered=is_filtered.to(torch.uint8),
        coins=requests.coins,
        draws=requests.draws,
    )
    tokens = torch.where(has_none, target_lasts[:, 0], tokens).clamp(0, logits.shape[1] - 1)
    return accepted, tokens, is_bad[: len(target)].unflatten(0, (num_requests, -1)).any(1)
