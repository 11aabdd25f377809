"""What the compile gate launches of `norm`: the layer input and the query latent of both models."""

import torch

from dsv4_kernels.cases import FLASH, PRO
from dsv4_kernels.norm import triton as norm
from dsv4_kernels.norm.embed import embed_and_norm_fp8

from . import for_library

RUNS = {
    f"{name} {dim}": getattr(shapes, dim)
    for name, shapes in (("pro", PRO), ("flash", FLASH))
    for dim in ("hidden_size", "q_lora_rank")
}
KERNELS = {"_rms_norm", "_two_norms"}


def launch(run: str) -> None:
    """Launch one of RUNS on CPU tensors."""
    x, weight = torch.empty(16, RUNS[run], dtype=torch.bfloat16), torch.empty(RUNS[run])
    norm.rms_norm(x, weight, 1e-6)
    norm.rms_norm_fp8(x, weight, 1e-6)
    embed_and_norm_fp8(x, torch.zeros(4, dtype=torch.int64), weight, x, weight, 1e-6)
    with for_library():
        norm.rms_norm_fp8(x, weight, 1e-6)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """None: no kernel multiplies matrices."""
    return set()
