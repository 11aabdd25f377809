"""What the compile gate launches of `indexer`: queries, decode in one launch, a chunk with a top-k of its own."""

from dsv4_kernels.cases import PRO
from dsv4_kernels.indexer.cases import HEADS, PRO_TOP_K, Case, Queries
from dsv4_kernels.indexer.queries import prepare_queries
from dsv4_kernels.indexer.triton import ONE_LAUNCH_ROWS, select

RUNS = {
    "8K": Case("decode", (8191,), (1,)),
    "1M": Case("decode", ((1 << 20) - 1,), (1,)),
    "chunk to 64K": Case("chunk", ((64 << 10) - ONE_LAUNCH_ROWS - 1,), (ONE_LAUNCH_ROWS + 1,)),
}
KERNELS = {"_prepare", "_prepare_q", "_scores", "_top_k"}  # heads of many rows have a launch of their own


def launch(run: str) -> None:
    """Launch everything of one of RUNS on CPU tensors."""
    arguments = RUNS[run].make(HEADS, PRO_TOP_K, 0)
    prepare_queries(**Queries(arguments["rows"], PRO.num_attention_heads, HEADS, PRO.head_dim).make(0))
    select(**arguments)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """What the machine code must multiply matrices with."""
    return set() if kernel in ("_top_k", "_prepare_q") else {{90: "HGMMA", 103: "UTCHMMA"}[capability]}
