"""What the compile gate launches of `kv_store`: a step's rows into workspace and ring, the late commit, the queries."""

from dsv4_kernels.cases import FLASH, PRO
from dsv4_kernels.kv_store import triton as kv_store
from dsv4_kernels.kv_store.cases import Case

RUNS = {
    "pro, decode": Case("pro", PRO, ((8192, 1),)),
    "flash, drafts": Case("flash", FLASH, ((8192, 4),), num_drafts=3),
}
KERNELS = {"_store", "_commit", "_prepare_q"}


def launch(run: str) -> None:
    """Launch everything of one of RUNS on CPU tensors."""
    inputs = RUNS[run].make(0)
    kv_store.store_kv(**inputs)
    places = ("rows", "step_planes", "ring_planes", "ring_rows", "window")
    kv_store.commit(**{key: inputs[key] for key in places})
    kv_store.prepare_q(**RUNS[run].queries(0))


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """Nothing is multiplied by a matrix."""
    return set()
