"""Drafts on the device: made, judged, and the MTP block brought up to where the main model is.

The contract is that of `speculative.MtpChain` and `speculative.judge`: the block stands one position behind the main
model, and a slot keeps the main model's streams of its last position for it. Here every request of a step has a row in
each pass of the block, padding where it has no such draft, so that shapes do not depend on numbers of drafts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.arrival import own_counters
from dsv4_kernels.metadata import StepPlan
from dsv4_kernels.metadata.triton import place_drafts, shift_streams
from dsv4_kernels.rope.triton import rope_tables
from dsv4_kernels.sampling.finite import keep_finite
from dsv4_kernels.sampling.triton import sample
from dsv4_kernels.spec_accept.triton import accept, settle_tokens
from dsv4serve.memory import CachePools
from dsv4serve.model.device import DeviceMtp
from dsv4serve.runner.device_step import PagedDeviceStep


@dataclass(frozen=True)
class MadeDrafts:
    """The drafts of a step."""

    tokens: Tensor  # int64 [R, K], -1 where a request has none
    rotations: Tensor  # of the block at the positions of `StepPlan.behind`


class Drafter:
    """Makes drafts and keeps the block's cache up to date.

    Args:
        mtp: the block.
        pools: a cache with room for drafts.
        page_table: int32 [slots, pages], which the block does not read.
    """

    def __init__(self, mtp: DeviceMtp, pools: CachePools, page_table: Tensor) -> None:
        self._mtp, self._pools, self._page_table = mtp, pools, page_table
        device = page_table.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def propose(self, plan: StepPlan, logits: Tensor) -> MadeDrafts:
        """Make the step's drafts, put them into the ids of its rows, and write what they were drawn from to float32
        `logits` [R, K, vocab], finite."""
        streams, ids = self._pools.load_streams(plan.places, self._mtp.config.hc_mult, torch.bfloat16), plan.last_ids
        num_requests, num_drafts = logits.shape[:2]
        (rotations,) = rope_tables(plan.mtp_positions, self._mtp.block.attention.frequencies)
        chosen = torch.empty(num_drafts, num_requests, dtype=torch.int64, device=logits.device)
        for place, rows in enumerate(plan.passes):
            mine = rotations[place * num_requests : (place + 1) * num_requests]
            step = PagedDeviceStep(self._pools, rows, self._page_table, fits_rings=True, rotations=mine)
            streams, x = self._mtp.head.collapse(self._mtp.advance(streams, ids, step))
            own = logits[:, place]
            # A broken MTP block must cost speed, not answers: any proposal is as exact as any other.
            keep_finite(self._mtp.head.logits(x), own, plan.num_wrong[place])
            self._choose(place, own, plan, chosen[place])
            ids = chosen[place]
        return MadeDrafts(place_drafts(plan, chosen), rotations[num_drafts * num_requests :])

    def _choose(self, place: int, logits: Tensor, plan: StepPlan, out: Tensor) -> None:
        """The drafts int64 [R] at `place` to `out`: greedy requests take the best, others draw with their settings."""
        sample(logits, **plan.settings, uniform=plan.proposals[place], out=out)

    @contextmanager
    def beside(self, plan: StepPlan) -> Iterator[None]:
        """Of a step of decodes alone: bring the block's keys up to where the main model begins, while that runs inside.

        All that these keys depend on is there before the step: its tokens, and the streams behind them. So they are
        made on a stream of their own and cost the step nothing but what they take away from it (docs/adr/0017).
        """
        streams = self._pools.load_streams(plan.places, self._mtp.config.hc_mult, torch.bfloat16)
        step = PagedDeviceStep(self._pools, plan.behind, self._page_table, fits_rings=True)
        if self._stream is None:
            self._mtp.keep(streams, plan.ids, step)
            yield
            return
        main = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream), own_counters():
            self._mtp.keep(streams, plan.ids, step)
        yield
        main.wait_stream(self._stream)  # until here `streams` and `plan` are referenced, so nobody gets their memory

    def follow(
        self,
        plan: StepPlan,
        streams: Tensor,
        made: MadeDrafts | None,
        ends: Tensor,
        banks: Tensor,
        fits_rings: bool,
    ) -> None:
        """Commit what each request goes on from, and, but after `beside`, bring the block's keys up to there.

        Keys of rows that do not stay are written too: they lie where those of the next step will.

        Args:
            streams: bf16 [rows, c, hidden] that the main model left.
            made: the step's drafts; None where it has none.
            ends, banks: of `end_step`.
            fits_rings: see PagedDeviceStep.
        """
        num_rows, num_requests = len(streams), len(banks)
        if num_rows > num_requests:
            self._pools.commit(plan.places, banks)
        before = shift_streams(plan.rows, streams, self._pools.streams.view(streams.dtype), ends)
        if num_rows == num_requests:
            return
        rotations = None if made is None else made.rotations
        step = PagedDeviceStep(self._pools, plan.behind, self._page_table, fits_rings=fits_rings, rotations=rotations)
        self._mtp.keep(before, plan.ids, step)


def judge(logits: Tensor, plan: StepPlan, drafts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Accept or reject the `drafts` int64 [R, K], -1 = none, K >= 1.

    Args:
        logits: float32 [R * (2 K + 1), vocab]: of the main model behind 0 to K drafts of each request, then of what the
            drafts were drawn from.

    Returns int64 [R] how many are accepted, int64 [R] the token after them, and bool [R] whether logits of the main
    model were NaN or infinite. The token of a request without drafts is what `sample` draws for it.
    """
    num_requests, most = drafts.shape
    sizes = [num_requests * (most + 1), num_requests * most]
    lasts, is_bad = sample(logits, **plan.judged, uniform=plan.shares)
    (target, proposal), (target_lasts, proposal_lasts) = (
        [part.unflatten(0, (num_requests, -1)) for part in values.split(sizes)] for values in (logits, lasts)
    )
    accepted, tokens = accept(
        target,
        target_lasts,
        proposal,
        proposal_lasts,
        drafts,
        temperature=plan.settings["temperature"],
        is_filtered=plan.is_filtered,
        coins=plan.coins,
        draws=plan.draws,
    )
    return accepted, tokens, settle_tokens(plan.num_drafts, target_lasts, is_bad[: sizes[0]], tokens, logits.shape[1])
