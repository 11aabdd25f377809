"""What the compile gate launches of `mhc`: boundary with and without a finished sublayer, and the final collapse."""

import torch

from dsv4_kernels.cases import FLASH, PRO
from dsv4_kernels.mhc import triton as mhc
from dsv4_kernels.mhc.cases import Case

RUNS = {"pro, 1 token": ("pro", PRO, 1), "flash, 128 tokens": ("flash", FLASH, 128)}
KERNELS = {"_mix", "_finish"}


def launch(run: str) -> None:
    """Launch everything of one of RUNS on CPU tensors."""
    name, shapes, num_tokens = RUNS[run]
    inputs = Case(name, num_tokens, shapes).make(0, torch.bfloat16)
    streams, norm = inputs["streams"], torch.ones(shapes.hidden_size)
    post, comb = torch.ones(num_tokens, 4), torch.ones(num_tokens, 4, 4)
    mhc.mhc_boundary(norm=norm, output=streams[:, 0].contiguous(), post=post, comb=comb, **inputs)
    mhc.mhc_boundary(norm=norm, **inputs)
    head = {key: inputs[key] for key in ("streams", "hc_eps", "norm_eps")}
    mhc.mhc_head(fn=inputs["fn"][:4], base=inputs["base"][:4], scale=inputs["scale"][:1], norm=norm, **head)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """What the machine code must multiply matrices with. Few tokens fill no warpgroup tile."""
    if kernel != "_mix":
        return set()
    return {{90: "HGMMA", 103: "UTCHMMA"}[capability] if run == "flash, 128 tokens" else "HMMA"}
