"""What the compile gate launches of `router`: score and hash routing, gate weights of both types."""

import torch

from dsv4_kernels.cases import FLASH, PRO
from dsv4_kernels.deterministic import deterministic
from dsv4_kernels.mega_moe.tiles import empty_tiles
from dsv4_kernels.router import triton as router
from dsv4_kernels.router.cases import Case

RUNS = {
    "pro, 1 token": ("pro", PRO, 1),
    "pro, 64 tokens": ("pro", PRO, 64),
    "pro, 256 tokens": ("pro", PRO, 256),
    "flash, 2048 tokens": ("flash", FLASH, 2048),
    "pro, 2048 tokens, deterministic": ("pro", PRO, 2048),
}
KERNELS = {"_route", "_fill_tiles"}


def launch(run: str) -> None:
    """Launch everything of one of RUNS on CPU tensors."""
    with deterministic("deterministic" in run):
        _launch(run)


def _launch(run: str) -> None:
    name, shapes, num_tokens = RUNS[run]
    inputs = Case(name, num_tokens, shapes).make(0, torch.bfloat16)
    router.route(**inputs)
    inputs["gate_weight"] = inputs["gate_weight"].bfloat16()
    table = torch.zeros(8, shapes.num_experts_per_tok, dtype=torch.int64)
    positions = torch.zeros(num_tokens, dtype=torch.int32)
    tiles = empty_tiles(num_tokens * shapes.num_experts_per_tok, shapes.n_routed_experts, 16, positions.device)
    router.route(**inputs, positions=positions, tiles=tiles, rounded=torch.empty_like(inputs["x"]))
    router.route(**(inputs | {"tid2eid": table, "bias": None}), positions=positions)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """What the machine code must multiply matrices with."""
    return {{90: "HGMMA", 103: "UTCHMMA"}[capability]} if kernel == "_route" else set()
