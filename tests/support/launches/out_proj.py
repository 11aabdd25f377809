"""What the compile gate launches of `out_proj`: the first product; the second is one of `gemm`."""

import torch

from dsv4_kernels.cases import FLASH, PRO
from dsv4_kernels.deterministic import deterministic
from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.gemm.triton import grouped_fp8_out

from . import for_library

RUNS = {"pro, 1 token": (PRO, 1), "flash, 64 tokens": (FLASH, 64), "pro, 512 tokens": (PRO, 512)}
RUNS |= {f"flash, {num} tokens, deterministic": (FLASH, num) for num in (1, 512)}
KERNELS = {"_product"}


def launch(run: str) -> None:
    """Launch one of RUNS on CPU tensors."""
    shapes, num_tokens = RUNS[run]
    width, groups = shapes.num_attention_heads * shapes.head_dim, shapes.o_groups
    o = torch.empty(num_tokens, width, dtype=torch.bfloat16)
    num_rows, depth = groups * shapes.o_lora_rank, width // groups
    codes = torch.empty(num_rows, depth, dtype=torch.float8_e4m3fn)
    weight = Fp8Weight(codes, torch.empty(num_rows // 128, depth // 128, dtype=torch.uint8))
    with deterministic("deterministic" in run):
        grouped_fp8_out(o, weight, groups)
    if num_tokens > 1 and "deterministic" not in run:
        with for_library():
            grouped_fp8_out(o, weight, groups)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """What the machine code must multiply matrices with."""
    return {{90: "HGMMA", 103: "UTCHMMA"}[capability]} if kernel == "_product" else set()
