"""What the compile gate launches of `rope`: the tables of a step's rows."""

import torch

from dsv4_kernels.rope.triton import rope_tables

RUNS = {"64 rows": (1, 4, 128), "64 drafts": (1,)}
KERNELS = {"_rope_tables"}


def launch(run: str) -> None:
    """Launch one of RUNS on CPU tensors."""
    rope_tables(torch.zeros(64, dtype=torch.int32), torch.zeros(32), RUNS[run])


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """None: no kernel multiplies matrices."""
    return set()
