"""What the compile gate launches of `indexer`: queries, decode in one launch, a chunk with a top-k of its own."""

import torch

from dsv4_kernels.indexer.cases import HEADS, KEYS, PRO_TOP_K, ROPE_DIM, Case
from dsv4_kernels.indexer.triton import ONE_LAUNCH_ROWS, prepare_index_q, select

RUNS = {
    "8K": Case("decode", (8191,), (1,)),
    "1M": Case("decode", ((1 << 20) - 1,), (1,)),
    "chunk to 64K": Case("chunk", ((64 << 10) - ONE_LAUNCH_ROWS - 1,), (ONE_LAUNCH_ROWS + 1,)),
}
KERNELS = {"_prepare", "_scores", "_top_k"}


def launch(run: str) -> None:
    """Launch everything of one of RUNS on CPU tensors."""
    arguments = RUNS[run].make(HEADS, PRO_TOP_K, 0)
    num_rows = RUNS[run].num_rows
    rotations = torch.ones(num_rows, ROPE_DIM // 2, dtype=torch.complex64)
    weights = torch.ones(num_rows, HEADS)
    prepare_index_q(arguments["q"], weights, rotations, arguments["rows"], (HEADS * KEYS.dim) ** -0.5)
    select(**arguments)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """What the machine code must multiply matrices with."""
    return set() if kernel == "_top_k" else {{90: "HGMMA", 103: "UTCHMMA"}[capability]}
