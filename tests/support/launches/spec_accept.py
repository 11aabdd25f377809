"""What the compile gate launches of `spec_accept`: the drafts of a few requests at the released vocabulary."""

import torch

from dsv4_kernels.spec_accept.triton import accept, settle_tokens

RUNS = {"3 drafts": 3}
KERNELS = {"_total", "_weigh", "_choose", "_judged"}


def launch(run: str) -> None:
    """Launch one of RUNS on CPU tensors."""
    k, requests = RUNS[run], 4
    accept(
        torch.empty(requests, k + 1, 129280),
        torch.zeros(requests, k + 1, dtype=torch.int64),
        torch.empty(requests, k, 129280),
        torch.zeros(requests, k, dtype=torch.int64),
        torch.zeros(requests, k, dtype=torch.int64),
        temperature=torch.ones(requests),
        is_filtered=torch.ones(requests, dtype=torch.uint8),
        coins=torch.zeros(requests, k, dtype=torch.float64),
        draws=torch.zeros(requests, k + 1, dtype=torch.float64),
    )
    lasts, num_drafts = torch.zeros(requests, k + 1, dtype=torch.int64), torch.zeros(requests, dtype=torch.int32)
    settle_tokens(num_drafts, lasts, lasts > 0, lasts[:, 0].contiguous(), 129280)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """None: no kernel multiplies matrices."""
    return set()
