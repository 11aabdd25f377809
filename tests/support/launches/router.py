"""What the compile gate launches of `router`: score and hash routing, gate weights of both types.

Runs with the shared expert beside launch what the engine does: of few tokens, with gate weights in bfloat16.
"""

import torch

from dsv4_kernels.cases import FLASH, PRO, Shapes
from dsv4_kernels.deterministic import deterministic
from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.gemm.quantize import empty_rows
from dsv4_kernels.mega_moe.shared_up import SharedUp
from dsv4_kernels.mega_moe.tiles import empty_tiles
from dsv4_kernels.router import triton as router
from dsv4_kernels.router.cases import Case

RUNS = {
    "pro, 1 token": ("pro", PRO, 1),
    "pro, 1 token, shared": ("pro", PRO, 1),
    "flash, 16 tokens, shared": ("flash", FLASH, 16),
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
    shared = shared_up(shapes, num_tokens) if "shared" in run else None
    if shared is None:
        router.route(**inputs)
    inputs["gate_weight"] = inputs["gate_weight"].bfloat16()
    table = torch.zeros(8, shapes.num_experts_per_tok, dtype=torch.int64)
    positions = torch.zeros(num_tokens, dtype=torch.int32)
    tiles = empty_tiles(num_tokens * shapes.num_experts_per_tok, shapes.n_routed_experts, 16, positions.device)
    inputs |= {"positions": positions, "shared": shared}
    router.route(**inputs, tiles=tiles, rounded=torch.empty_like(inputs["x"]))
    router.route(**(inputs | {"tid2eid": table, "bias": None}))


def shared_up(shapes: Shapes, num_tokens: int) -> SharedUp:
    """The shared expert's first product, of random memory."""
    width, hidden = shapes.moe_intermediate_size, shapes.hidden_size
    codes = torch.empty(2 * width, hidden, dtype=torch.float8_e4m3fn)
    weight = Fp8Weight(codes, torch.empty(2 * width // 128, hidden // 128, dtype=torch.uint8))
    return SharedUp.build(empty_rows(num_tokens, hidden, codes.device), weight, shapes.swiglu_limit)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """What the machine code must multiply matrices with: bfloat16, and FP8 where the shared expert is beside."""
    if kernel != "_route":
        return set()
    gate, fp8 = {90: ("HGMMA", "QGMMA"), 103: ("UTCHMMA", "UTCQMMA")}[capability]
    return {gate, fp8} if "shared" in run else {gate}
