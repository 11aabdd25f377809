"""What the compile gate launches of `compressor`: the three compressors of the released models."""

from dsv4_kernels.compressor.cases import CASES, INDEX, MAIN
from dsv4_kernels.compressor.triton import compress_c4, compress_c128
from dsv4_kernels.metadata import C4, C128

RUNS = {
    "c4": (compress_c4, C4, MAIN, 8),
    "c4 with drafts": (compress_c4, C4, MAIN, 16),
    "indexer": (compress_c4, C4, INDEX, 8),
    "c128": (compress_c128, C128, MAIN, 8),
}
KERNELS = {"_c4", "_c128"}


def launch(run: str) -> None:
    """Launch everything of one of RUNS on CPU tensors."""
    compress, ratio, row_format, ring_rows = RUNS[run]
    arguments, _ = CASES[0].make(ratio, row_format, 0, ring_rows)
    compress(**arguments)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """What the machine code must multiply matrices with: only the rotation of one index key at a time does."""
    return {"HMMA"} if run == "indexer" else set()
