"""What a step of the GPU engine is, from a few numbers per request: the torch form, which `triton.plan_step` equals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.metadata.rows import Rows
from dsv4_kernels.sampling.reference import COIN, DRAFT, uniforms

# One number of each for every request of a step. `start` and `index` are the positions that are computed and the
# outputs that are there; if it `follows` a step with drafts whose result nobody has seen, with none of these accepted.
INTEGERS = ("slot", "start", "count", "num_drafts", "top_k", "seed", "index", "follows")
FLOATS = ("temperature", "top_p", "min_p")  # float64, in the bytes of an int64
INPUTS = INTEGERS + FLOATS
TOKEN, ACCEPTED = 0, 1  # rows of what a step leaves of each slot: what it sampled last, and how many drafts it accepted
LAST_TOKEN = -1  # in place of a token id: what the slot sampled last, in a verify's next rows its drafts
SETTINGS = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class StepPlan:
    """R requests with up to K drafts each, and their T rows. All that has to do with drafts is empty where K is 0.

    A pass of the MTP block for one draft has a row for each request, -1 where it has no such draft. The block stands
    one position behind the main model.
    """

    slots: Tensor  # int32 [R], -1 = padding
    places: Tensor  # int64 [R], the same with one more slot for padding
    starts: Tensor  # int32 [R], positions that are computed
    counts: Tensor  # int32 [R], rows of the step, drafts included
    first_rows: Tensor  # int32 [R], each request's first row
    num_drafts: Tensor  # int32 [R]
    is_filtered: Tensor  # uint8 [R], whether top-k, top-p or min-p cut anything
    settings: dict[str, Tensor]  # arguments of `sample`, [R] each
    judged: dict[str, Tensor]  # the same [R (2 K + 1)], for the rows of `judge`: K + 1 of each request, then K of each
    # float64 [R (2 K + 1)], `uniform` of these: 1, which gives the last token that filters keep; the first one of a
    # request without drafts has its random number.
    shares: Tensor
    draws: Tensor  # float64 [R, K + 1]: random numbers for the token behind 0 to K drafts,
    coins: Tensor  # float64 [R, K]: to accept each draft,
    proposals: Tensor  # float64 [K, R]: and to make it
    sampling_rows: Tensor  # int64 [R, K + 1]: rows behind 0 to K drafts; beyond a request's last one that is repeated
    passes: tuple[Rows, ...]  # K, with R rows each
    rows: Rows  # of the main model
    behind: Rows  # of the MTP block, one position behind them
    # int32 [K R + T]: positions of all passes, then of `behind`.
    mtp_positions: Tensor
    ids: Tensor  # int64 [T]: tokens of the rows; drafts are not known yet
    last_ids: Tensor  # int64 [R], what each slot sampled last
    num_wrong: Tensor  # int32 [K, R] zeros


def plan_step(inputs: Tensor, token_ids: Tensor, left: Tensor, num_drafts: int) -> StepPlan:
    """The plan, by torch operations.

    Args:
        inputs: int64 [INPUTS, R]; count 0 = padding, slot -1.
        token_ids: int64 [T], T at least the sum of counts: tokens of the rows or LAST_TOKEN.
        left: int64 [2, slots + 1], rows TOKEN and ACCEPTED, of the steps before.
        num_drafts: K, the most that a request has.
    """
    numbers: dict[str, Any] = dict(zip(INPUTS, inputs, strict=True))
    most, (num_requests, num_rows) = num_drafts, (inputs.shape[1], len(token_ids))
    last_tokens, places = left[TOKEN], torch.where(numbers["count"] > 0, numbers["slot"], left.shape[1] - 1)
    unseen = torch.where(numbers["follows"] > 0, left[ACCEPTED, places], 0)
    numbers |= {name: numbers[name] + unseen for name in ("start", "index")}
    slots, starts, counts, drafts_each = (numbers[name].int() for name in INTEGERS[:4])
    settings = {name: numbers[name] for name in SETTINGS}
    settings |= {name: settings[name].view(torch.float64).float() for name in FLOATS}
    place = torch.arange(most + 1, dtype=torch.int32, device=inputs.device)
    draws, coins, proposals = (
        uniforms(numbers["seed"].unsqueeze(1), numbers["index"].unsqueeze(1) + place[:count], stream)
        for count, stream in ((most + 1, 0), (most, COIN), (most, DRAFT))
    )
    has_none = drafts_each == 0
    shares = torch.ones(num_requests, 2 * most + 1, dtype=torch.float64, device=inputs.device)
    shares[:, 0] = torch.where(has_none, draws[:, 0], 1.0)

    def repeated(values: Tensor) -> Tensor:
        each = values.unsqueeze(1).expand(-1, 2 * most + 1) if values.dim() == 1 else values
        return torch.cat([each[:, : most + 1].reshape(-1), each[:, most + 1 :].reshape(-1)])

    rows = Rows.build(slots, starts, counts, num_rows)
    is_row = rows.slots >= 0
    behind = torch.where(is_row, rows.positions - 1, -1)
    known = last_tokens[torch.where(is_row, rows.slots, -1).long()]
    firsts = counts.cumsum(0, dtype=torch.int32) - counts
    sampling = (firsts + counts - drafts_each - 1).clamp_min(0).unsqueeze(1)
    has_draft = place[:-1].unsqueeze(1) < drafts_each
    positions = torch.where(has_draft, starts - 1 + place[:-1].unsqueeze(1), -1)
    alone = torch.arange(num_requests, dtype=torch.int32, device=inputs.device), torch.ones_like(slots)
    return StepPlan(
        slots=slots,
        places=places,
        starts=starts,
        counts=counts,
        first_rows=firsts,
        num_drafts=drafts_each,
        is_filtered=((settings["top_k"] > 0) | (settings["top_p"] < 1) | (settings["min_p"] > 0)).to(torch.uint8),
        settings=settings,
        judged={name: repeated(values) for name, values in settings.items()},
        shares=repeated(shares),
        draws=draws,
        coins=coins,
        proposals=proposals.t().contiguous(),
        sampling_rows=(sampling + torch.minimum(place, drafts_each.unsqueeze(1))).long(),
        passes=tuple(
            Rows(torch.where(has, slots, -1), position, *alone)
            for has, position in zip(has_draft, positions, strict=True)
        ),
        rows=rows,
        behind=Rows(rows.slots, behind, rows.firsts, rows.counts),
        mtp_positions=torch.cat([positions.flatten(), behind]),
        ids=torch.where(is_row, torch.where(token_ids == LAST_TOKEN, known, token_ids), 0),
        last_ids=last_tokens[places],
        num_wrong=torch.zeros(most, num_requests, dtype=torch.int32, device=inputs.device),
    )


def place_drafts(plan: StepPlan, chosen: Tensor) -> Tensor:
    """Put the drafts, int64 [K, R], into the ids of the step's rows. Returns them int64 [R, K], -1 where a request has
    none."""
    for request, num in enumerate(plan.num_drafts.tolist()):
        first = int(plan.first_rows[request]) + 1
        plan.ids[first : first + num] = chosen[:num, request]
    place = torch.arange(len(chosen), device=chosen.device)
    return torch.where(place < plan.num_drafts.unsqueeze(1), chosen.t(), -1)


def end_step(
    plan: StepPlan,
    left: Tensor,
    tokens: Tensor,
    is_bad: Tensor,
    num_banks: int,
    accepted: Tensor | None = None,
    drafts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a step leaves, once its tokens are known.

    Args:
        left: int64 [2, slots + 1] as `plan_step` takes it: replaced for the slots of the step.
        tokens, is_bad: int64 [R] and bool [R]: the new tokens, and which mean nothing.
        num_banks: C128 states of a slot.
        accepted, drafts: int64 [R] and [R, K], of a step with drafts.

    Returns:
        results: int64 [R, 1], the new token, -1 = bad; with drafts [R, 3 + K]: also how many of them are accepted, of
            how many the logits were not finite, and the drafts;
        ends: int32 [T], of which those at each request's first row have its last row that stays;
        banks: int64 [R], the C128 state that each request goes on from.
    """
    kept = plan.counts if accepted is None else plan.counts - plan.num_drafts + accepted.int()
    left[TOKEN, plan.places] = tokens
    left[ACCEPTED, plan.places] = 0 if accepted is None else accepted
    results = torch.where(is_bad, -1, tokens).unsqueeze(1)
    if accepted is not None and drafts is not None:
        place = torch.arange(drafts.shape[1], device=drafts.device).unsqueeze(1)
        wrong = torch.where(place < plan.num_drafts, plan.num_wrong, 0).sum(0)
        results = torch.cat([results, accepted.unsqueeze(1), wrong.unsqueeze(1), drafts], 1)
    ends = torch.zeros_like(plan.rows.slots)
    is_there = plan.counts > 0
    ends[plan.first_rows[is_there].long()] = (plan.first_rows + kept - 1)[is_there]
    banks = torch.where((plan.counts <= num_banks) & is_there, kept - 1, 0).long()
    return results, ends, banks


def shift_streams(rows: Rows, streams: Tensor, stored: Tensor, ends: Tensor) -> Tensor:
    """Each row's input of the MTP block: the streams of the row before it, of a request's first row what was stored.

    Args:
        streams: bf16 [T, ..] that the main model left.
        stored: bf16 [slots + 1, the same, flat]: streams of each slot's last position; replaced by those of the last
            row that stays.
        ends: see `end_step`.

    Returns bf16 of the shape of `streams`; rows of padding are 0.
    """
    before = torch.zeros_like(streams)
    before[1:] = torch.where((rows.slots[1:] >= 0).view(-1, *[1] * (streams.dim() - 1)), streams[:-1], 0)
    row = torch.arange(len(streams), dtype=torch.int32, device=streams.device)
    firsts = row[row == rows.firsts].long()
    slots = rows.slots[firsts].long()
    before[firsts] = stored[slots].view(-1, *streams.shape[1:])
    stored[slots] = streams[ends[firsts].long()].flatten(1)
    return before
