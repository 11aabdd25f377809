"""What the compile gate launches of `quant`: both formats, as codes and as values."""

import torch

from dsv4_kernels.cases import PRO
from dsv4_kernels.quant import triton as quant
from dsv4_kernels.quant.cases import Case

RUNS = {"pro, 64 tokens": ("pro", PRO, 64)}
KERNELS = {"_quantize"}


def launch(run: str) -> None:
    """Launch everything of one of RUNS on CPU tensors."""
    name, shapes, num_tokens = RUNS[run]
    x = Case(name, num_tokens, shapes).make(0, torch.bfloat16)["x"]
    for fp8 in (quant.quantize_fp8, quant.fake_quantize_fp8):
        fp8(x, 128)
    for fp4 in (quant.quantize_fp4, quant.fake_quantize_fp4):
        fp4(x)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """None: it multiplies no matrices."""
    return set()
