"""What the compile gate launches of `sampling`: a draw at the released vocabulary."""

import torch

from dsv4_kernels.sampling import triton as sampling

RUNS = {"16 rows": 16}
KERNELS = {"_scan", "_weigh", "_collect", "_draw"}


def launch(run: str) -> None:
    """Launch one of RUNS on CPU tensors."""
    rows = RUNS[run]
    ones = torch.ones(rows)
    settings = {"temperature": ones, "top_k": ones.long(), "top_p": ones, "min_p": ones, "uniform": ones.double()}
    sampling.sample(torch.empty(rows, 129280), **settings)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """None: no kernel multiplies matrices."""
    return set()
