"""Named inputs of `mega_moe`: `mega_moe(**case.make(seed))`. Used by tests and benchmarks."""

from __future__ import annotations

import math
from typing import Any

import torch

from dsv4_kernels.cases import RUNS, Run, Shapes, generator, matrix, nonzero

MAX_EXPERTS = 12


class Case(Run):
    """One layer. Pro and Flash with 12 of their experts: all of Pro's are 101 GB in float32."""

    def make(self, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of `mega_moe`; activations in `dtype`, never zero."""
        random, sizes = generator(seed), self.shapes
        hidden, width, top_k = sizes.hidden_size, sizes.moe_intermediate_size, sizes.num_experts_per_tok
        num_experts = min(sizes.n_routed_experts, MAX_EXPERTS)
        order = torch.rand(self.num_tokens, num_experts, generator=random).argsort(dim=1)
        weights = torch.rand(self.num_tokens, top_k, generator=random) + 0.1
        return {
            "x": nonzero(random, self.num_tokens, hidden).to(dtype),
            "expert_ids": order[:, :top_k].contiguous(),
            "weights": weights / weights.sum(dim=1, keepdim=True) * sizes.routed_scaling_factor,
            "w13": matrix(random, num_experts, 2 * width, hidden),
            "w2": matrix(random, num_experts, hidden, width),
            "shared_w13": matrix(random, 2 * width, hidden),
            "shared_w2": matrix(random, hidden, width),
            "limit": sizes.swiglu_limit,
        }


CASES = [Case(*run) for run in RUNS]


def packed_weight(
    random: torch.Generator, num_experts: int, num_rows: int, depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of true size as the checkpoint holds it, on the generator's device: any codes, scales of three sizes.

    (uint8 [E, rows, depth / 2], E8M0 bytes uint8 [E, rows, depth / 32]); it keeps the size of its input.
    """
    device = random.device
    packed = torch.empty(num_experts, num_rows, depth // 2, dtype=torch.uint8, device=device).random_(generator=random)
    middle = 127 + round(math.log2(depth**-0.5 / 2.93))  # 2.93: root mean square of the sixteen codes
    shape = (num_experts, num_rows, depth // 32)
    scale = torch.randint(middle - 1, middle + 2, shape, dtype=torch.uint8, device=device, generator=random)
    return packed, scale


def routed_tokens(random: torch.Generator, num_tokens: int, shapes: Shapes) -> dict[str, torch.Tensor]:
    """The other tensors of the GPU kernels, on the generator's device: bfloat16, experts drawn evenly."""
    device, top_k = random.device, shapes.num_experts_per_tok
    x, shared = (torch.randn(num_tokens, shapes.hidden_size, device=device, generator=random) for _ in range(2))
    order = torch.rand(num_tokens, shapes.n_routed_experts, device=device, generator=random).argsort(dim=1)
    weights = torch.rand(num_tokens, top_k, device=device, generator=random) + 0.1
    return {
        "x": x.bfloat16(),
        "expert_ids": order[:, :top_k].contiguous(),
        "weights": weights / weights.sum(dim=1, keepdim=True) * shapes.routed_scaling_factor,
        "shared": shared.bfloat16(),
    }
