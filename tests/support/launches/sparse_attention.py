"""What the compile gate launches of `sparse_attention`: decode and prefill of each kind of layer, whole and split."""

import triton

from dsv4_kernels.cases import DEMO, FLASH, PRO
from dsv4_kernels.sparse_attention import triton as attention
from dsv4_kernels.sparse_attention.cases import Case

RUNS = {
    "pro, C4, whole": Case("pro", PRO, [(8192, 2), (300, 1)], ratio=4, top_k=1024),
    "pro, C4, split": Case("pro", PRO, [(8192, 1)], ratio=4, top_k=1024),
    "pro, C128, whole": Case("pro", PRO, [(8192, 2), (300, 1)], ratio=128),
    "pro, C128, split": Case("pro", PRO, [(65536, 1)], ratio=128),
    "flash, window, whole": Case("flash", FLASH, [(8192, 2), (300, 1)]),
    "flash, C4, split": Case("flash", FLASH, [(8192, 4)], ratio=4, top_k=512, num_drafts=3),
    "demo, C4, split": Case("demo", DEMO, [(1024, 1)], ratio=4, top_k=64),
}
KERNELS = {"_attend", "attend_specialized", "_combine"}
HOPPER = {"attend_specialized"}  # not compiled for other targets
# The warps that make keys have all their registers full when a block begins, and Triton 3.9 keeps up to eight words of
# theirs there for as long as it takes to convert it, and beside them what a tile needs once; Triton 3.6 one word.
STACK = {"attend_specialized": 48}


def launch(run: str) -> None:
    """Launch one of RUNS on CPU tensors."""
    blackwell = triton.runtime.driver.active.get_current_target().arch >= 100
    inputs = RUNS[run].make(0) | {"num_splits": None if "split" in run else 1}
    attention.sparse_attention(**inputs, turned=True if blackwell else None, specialized=False)
    if not blackwell and inputs["q"].shape[2] == 512:
        attention.sparse_attention(**inputs, specialized=True)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """What the machine code must multiply matrices with. The demo's eight heads are no tile of the scores' product."""
    if kernel == "_combine":
        return set()
    large = {90: "HGMMA", 103: "UTCHMMA"}[capability]
    return {large, "HMMA"} if run.startswith("demo") else {large}
