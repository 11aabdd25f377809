"""What the compile gate launches of `mhc`: boundary with and without a finished sublayer, and the final collapse."""

import torch

from dsv4_kernels.cases import FLASH, PRO
from dsv4_kernels.deterministic import deterministic
from dsv4_kernels.mhc import triton as mhc
from dsv4_kernels.mhc.cases import Case

from . import for_library

RUNS = {
    "pro, 1 token": ("pro", PRO, 1),
    "pro, 4 tokens": ("pro", PRO, 4),
    "flash, 1 token": ("flash", FLASH, 1),
    "pro, 64 tokens": ("pro", PRO, 64),
    "pro, 200 tokens": ("pro", PRO, 200),
    "pro, 256 tokens": ("pro", PRO, 256),
    "pro, 256 tokens, deterministic": ("pro", PRO, 256),
}
KERNELS = {"mix_one", "_mix", "finish_tokens", "_add_output", "_take_apart", "_product"}


def launch(run: str) -> None:
    """Launch everything of one of RUNS on CPU tensors."""
    with deterministic("deterministic" in run):
        _launch(run)


def _launch(run: str) -> None:
    name, shapes, num_tokens = RUNS[run]
    inputs = Case(name, num_tokens, shapes).make(0, torch.bfloat16)
    streams, norm = inputs["streams"], torch.ones(shapes.hidden_size)
    post, comb = torch.ones(num_tokens, 4), torch.ones(num_tokens, 4, 4)
    for num_parts in (1, shapes.num_experts_per_tok + 1):  # attention; routed experts and the shared one
        output = streams[:, :1].expand(-1, num_parts, -1).contiguous()
        mhc.mhc_boundary(norm=norm, output=output, post=post, comb=comb, **inputs)
    mhc.mhc_boundary(norm=norm, **inputs)
    if run == "pro, 64 tokens":
        with for_library():
            mhc.mhc_boundary(norm=norm, **inputs)
    head = {key: inputs[key] for key in ("streams", "hc_eps", "norm_eps")}
    head |= {"fn": inputs["fn"][:4], "base": inputs["base"][:4], "scale": inputs["scale"][:1], "norm": norm}
    mhc.mhc_head(**head, output=output, post=post, comb=comb)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """What the machine code must multiply matrices with. Few tokens fill no warpgroup tile."""
    if kernel not in ("_mix", "_product"):
        return set()
    return {{90: "HGMMA", 103: "UTCHMMA"}[capability] if run in ("pro, 200 tokens", "pro, 256 tokens") else "HMMA"}
