"""What the compile gate launches of `sampling`: a draw and log probabilities at the released vocabulary."""

import torch

from dsv4_kernels.sampling import triton as sampling
from dsv4_kernels.sampling.finite import keep_finite
from dsv4_kernels.sampling.logprobs import token_logprobs

RUNS = {"16 rows": 16}
KERNELS = {"_scan", "_weigh", "_settle", "_chunks", "_rows", "_keep_finite"}


def launch(run: str) -> None:
    """Launch one of RUNS on CPU tensors."""
    rows = RUNS[run]
    ones = torch.ones(rows)
    settings = {"temperature": ones, "top_k": ones.long(), "top_p": ones, "min_p": ones, "uniform": ones.double()}
    logits = torch.empty(rows, 129280)
    sampling.sample(logits, **settings)
    token_logprobs(logits, settings["top_k"], 20)
    keep_finite(logits, torch.empty(rows, 3, 129280)[:, 1], torch.zeros(rows, dtype=torch.int32))


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """None: no kernel multiplies matrices."""
    return set()
