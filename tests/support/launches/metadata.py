"""What the compile gate launches of `metadata`: plan, drafts, end and streams of steps of Pro."""

import torch

from dsv4_kernels.metadata import triton as metadata
from dsv4_kernels.metadata.plan import INPUTS

RUNS = {"64 decodes": (64, 64, 0), "64 verifies": (64, 256, 3), "chunks": (256, 8192, 0)}
KERNELS = {"_plan", "_place", "_end", "_shift"}


def launch(run: str) -> None:
    """Launch one of RUNS on CPU tensors."""
    num_requests, num_rows, most = RUNS[run]
    inputs = torch.zeros(len(INPUTS), num_requests, dtype=torch.int64)
    left, tokens = torch.zeros(2, num_requests + 1, dtype=torch.int64), inputs[0].contiguous()
    plan = metadata.plan_step(inputs, torch.zeros(num_rows, dtype=torch.int64), left, most)
    drafts = accepted = None
    if most:
        drafts, accepted = metadata.place_drafts(plan, inputs[:most].contiguous()), tokens
    _, ends, _ = metadata.end_step(plan, left, tokens, tokens > 0, 1 + most, accepted, drafts)
    streams, stored = (
        torch.empty(num_rows, 4, 7168, dtype=torch.bfloat16),
        torch.empty(2, 4 * 7168, dtype=torch.bfloat16),
    )
    metadata.shift_streams(plan.rows, streams, stored, ends)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """None: no kernel multiplies matrices."""
    return set()
