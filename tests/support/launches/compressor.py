"""What the compile gate launches of `compressor`: the compressors of the released models, those of C4 in one launch,
and a decode step's beside norm and window rows."""

from dsv4_kernels.compressor.cases import CASES, INDEX, MAIN, compress, prepare
from dsv4_kernels.deterministic import deterministic
from dsv4_kernels.metadata import C4, C128

RUNS = {
    "c4": (C4, (MAIN, INDEX), {}),
    "c4 with drafts": (C4, (MAIN, INDEX), {"ring_rows": 16}),
    "c128": (C128, (MAIN,), {}),
    "c128 with drafts": (C128, (MAIN,), {"banks": 4}),
    "c128, deterministic": (C128, (MAIN,), {}),
}
KERNELS = {"_c4", "_c128", "_beside_c4", "_beside_c128"}


def launch(run: str) -> None:
    """Launch everything of one of RUNS on CPU tensors."""
    ratio, formats, sizes = RUNS[run]
    made = [CASES[0].make(ratio, each, 0, **sizes)[0] for each in formats]
    with deterministic("deterministic" in run):
        compress(ratio, *made)
    if "deterministic" not in run:  # then each operation has a launch of its own
        prepare(ratio, *made)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """What the machine code must multiply matrices with: nothing does."""
    return set()
