"""Time of a step's index arithmetic against its floor, on a GPU: `python -m dsv4_kernels.metadata.bench OUT.jsonl`.

Bytes: of `plan_step` the inputs and the ids read, the rows' numbers and ids written; of `shift_streams` the streams
read and written once, those of slots once more. FLOPs: none. At few rows a launch is all that there is to see.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from dsv4_kernels.benching import Measured, measure, num_copies, write_lines
from dsv4_kernels.cases import MODELS, released
from dsv4_kernels.metadata.plan import INPUTS
from dsv4_kernels.metadata.triton import end_step, plan_step, shift_streams

NUM_DRAFTS = 3
REQUESTS = (1, 16, 64, 256)
ROW_BYTES = 8 + 8 + 5 * 4  # id read and written, four numbers of a row and its position in the MTP block
C = 4  # streams


def plan_bytes(requests: int) -> int:
    """Bytes that a plan of verifies must move."""
    return requests * (8 * len(INPUTS) + (1 + NUM_DRAFTS) * ROW_BYTES)


def shift_bytes(requests: int, hidden: int) -> int:
    """Bytes that must move when each request has a row for each draft: read and written, those of its slot too."""
    return 2 * 2 * C * hidden * requests * (2 + NUM_DRAFTS)


def make(requests: int) -> dict[str, Any]:
    """Keyword arguments of `plan_step` for verifies, on the GPU."""
    inputs = torch.zeros(len(INPUTS), requests, dtype=torch.int64)
    inputs[0], inputs[1] = torch.arange(requests), 1000
    inputs[2], inputs[3] = 1 + NUM_DRAFTS, NUM_DRAFTS
    ids, left = (torch.zeros(s, dtype=torch.int64) for s in ((requests * (1 + NUM_DRAFTS),), (2, requests + 1)))
    tensors = {"inputs": inputs.cuda(), "token_ids": ids.cuda(), "left": left.cuda()}
    return {**tensors, "num_drafts": NUM_DRAFTS}


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """Plan and streams of verifies, of each number of requests; the plan knows no model."""
    for requests in REQUESTS:
        given, moved = make(requests), plan_bytes(requests)
        yield measure([lambda given=given: plan_step(**given)], moved, 0).as_line(
            op=f"plan_step, {NUM_DRAFTS} drafts", implementation="triton", shapes="released", num_tokens=requests
        )
        plan, tokens = plan_step(**given), torch.zeros(requests, dtype=torch.int64, device="cuda")
        drafts = torch.zeros(requests, NUM_DRAFTS, dtype=torch.int64, device="cuda")
        _, ends, _ = end_step(plan, given["left"], tokens, tokens > 0, 1 + NUM_DRAFTS, tokens, drafts)
        for name, shapes in released(models):
            moved, width = shift_bytes(requests, shapes.hidden_size), C * shapes.hidden_size
            calls = []
            for _ in range(num_copies(moved)):
                sizes = (requests * (1 + NUM_DRAFTS), width), (requests + 1, width)
                streams, stored = (torch.randn(*size, device="cuda").bfloat16() for size in sizes)
                calls.append(lambda a=streams, b=stored, plan=plan, ends=ends: shift_streams(plan.rows, a, b, ends))
            yield measure(calls, moved, 0).as_line(
                op="shift_streams", implementation="triton", shapes=name, num_tokens=requests
            )


if __name__ == "__main__":
    write_lines(lines())
