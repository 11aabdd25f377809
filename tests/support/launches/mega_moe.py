"""What the compile gate launches of `mega_moe`: every tile of every choice of activations.

On GB300 the weights keep the checkpoint's form where activations have one that its tensor cores take beside FP4.
"""

from typing import get_args

import torch
import triton

from dsv4_kernels.cases import FLASH, PRO, Shapes
from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.mega_moe import triton as moe
from dsv4_kernels.mega_moe.parallel.expert_map import ExpertMap
from dsv4_kernels.mega_moe.parallel.symmetric import Planes, Step, SymmetricExperts
from dsv4_kernels.mega_moe.parallel.wire import RowFormat
from dsv4_kernels.mega_moe.reference import Activations
from dsv4_kernels.mega_moe.weights import Form, Fp4Weight, empty_experts, form_for

BATCHES = (1, 8, 64, 256, 1024, 2048, 8192)  # tokens


def runs() -> dict[str, tuple[Shapes, int, Activations]]:
    """Of the batches the largest of each tile: a kernel depends on the number of tokens through its tile alone."""
    found = {}
    for name, shapes in (("pro", PRO), ("flash", FLASH)):
        for activations in get_args(Activations):
            largest = {}
            for num_tokens in BATCHES:
                form = form_for(activations, 10)  # on Hopper the largest two batches have one tile
                tile = moe.choose_tile(num_tokens, shapes.num_experts_per_tok, shapes.n_routed_experts, form)
                largest[tile] = num_tokens
            found |= {
                f"{name}, {batch} tokens, {activations}": (shapes, batch, activations) for batch in largest.values()
            }
    return found


RUNS = runs()
PLAIN = {"dispatch", "widen"}  # other streams and other GPUs take part: not launched early
HOPPER = {"gate_up_specialized", "down_specialized"}  # not compiled for other targets
KERNELS = {"_fill_tiles", "gate_up", "down", "_combine", "_quantize", "_swiglu", "_product"} | PLAIN | HOPPER
UNCONVERTED = {"gate_up", "down"} | HOPPER  # operands go into the tensor cores without a change of format
FEW = 256  # tokens; so many are sent between ranks too


def weight(num_experts: int, num_rows: int, depth: int, form: Form) -> Fp4Weight:
    """One expert seen as many."""
    one = empty_experts(1, num_rows, depth, form=form, device=torch.device("cpu"))
    many = (each.expand(num_experts, *[-1] * (each.dim() - 1)) for each in (one.values, one.scales, one.row_scales))
    return Fp4Weight(*many, form)


def launch(run: str) -> None:
    """Launch everything of one of RUNS on CPU tensors."""
    shapes, num_tokens, activations = RUNS[run]
    capability = triton.runtime.driver.active.get_current_target().arch // 10
    moe.is_hopper = lambda device: capability == 9
    form = form_for(activations, capability)
    hidden, width, top_k = shapes.hidden_size, shapes.moe_intermediate_size, shapes.num_experts_per_tok
    x = torch.empty(num_tokens, hidden, dtype=torch.bfloat16)
    moe.mega_moe(
        x,
        torch.zeros(num_tokens, top_k, dtype=torch.int64),
        torch.ones(num_tokens, top_k),
        weight(shapes.n_routed_experts, 2 * width, hidden, form),
        weight(shapes.n_routed_experts, hidden, width, form),
        shared_weight(2 * width, hidden),
        shared_weight(hidden, width),
        limit=shapes.swiglu_limit,
        activations=activations,
    )
    if num_tokens == FEW:
        weights = [weight(shapes.n_routed_experts // 2, *size, form) for size in ((2 * width, hidden), (hidden, width))]
        launch_parallel(x, shapes, activations, weights)


def shared_weight(num_rows: int, depth: int) -> Fp8Weight:
    """Of the shared expert."""
    codes = torch.empty(num_rows, depth, dtype=torch.float8_e4m3fn)
    return Fp8Weight(codes, torch.empty(num_rows // 128, depth // 128, dtype=torch.uint8))


class Anywhere:
    """The memory of two ranks, neither of which is there."""

    def __init__(self, num_bytes: int) -> None:
        self.mine = torch.empty(num_bytes, dtype=torch.uint8)
        self.addresses = torch.zeros(2, dtype=torch.int64)

    def barrier(self) -> None:
        pass


def launch_parallel(x: torch.Tensor, shapes: Shapes, activations: Activations, weights: list[Fp4Weight]) -> None:
    """What expert parallelism adds, on a rank that holds half of the experts."""
    top_k, num_experts = shapes.num_experts_per_tok, shapes.n_routed_experts
    planes = Planes.build(RowFormat(x.shape[1], top_k, activations), 2, len(x))
    experts = ExpertMap.build([range(num_experts // 2), range(num_experts // 2, num_experts)], num_experts)
    owner = SymmetricExperts(0, experts, planes, Anywhere(planes.num_bytes))
    ids = torch.zeros(len(x), top_k, dtype=torch.int64)
    step = Step(owner, x, ids, torch.ones(len(x), top_k), len(x))
    step.dispatch()
    step.received("bf16")
    # The tile of the run, so that the same instructions are expected.
    step.products(*weights, shapes.swiglu_limit, moe.choose_tile(len(x), top_k, num_experts, "bf16"))


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """Hopper multiplies bf16, or FP8 for such activations; GB300 what these are, with their scales, by FP4.

    The shared expert, FP8 by FP8, is in the same kernels where tiles are small.
    """
    shared = "QGMMA" if capability == 90 else "UTCQMMA"
    if kernel == "_product" or kernel in HOPPER:
        return {shared}
    if kernel not in ("gate_up", "down"):
        return set()
    shapes, num_tokens, activations = RUNS[run]
    native = {"bf16": "UTCHMMA", "fp8": "UTCQMMA", "fp4": "UTCOMMA"}
    routed = native[activations]
    if capability == 90:
        routed = "QGMMA" if activations == "fp8" else "HGMMA"
    tile = moe.choose_tile(num_tokens, shapes.num_experts_per_tok, shapes.n_routed_experts, "bf16")
    return {routed, shared} if tile == moe.TILES[0] else {routed}
