"""Time of the norms against their floor, on a GPU: `python -m dsv4_kernels.norm.bench OUT.jsonl`.

Bytes: x in bfloat16 read, the result written in bfloat16 or as E4M3 with a scale per 128, the float32 weight read once.
FLOPs: 4 a value. Memory decides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from dsv4_kernels.benching import Measured, measure, num_copies, relative_error, write_lines
from dsv4_kernels.cases import MODELS, released
from dsv4_kernels.norm import reference
from dsv4_kernels.norm.triton import rms_norm, rms_norm_fp8

TOKENS = (1, 16, 64, 256, 2048, 8192)
EPS = 1e-6


def floor_bytes(num_tokens: int, dim: int, fp8: bool) -> int:
    """Bytes that one norm must move."""
    written = dim + dim // 128 if fp8 else 2 * dim
    return num_tokens * (2 * dim + written) + 4 * dim


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """The layer input in bfloat16 and the query latent in E4M3, of each model and number of tokens."""
    for name, shapes in released(models):
        for num_tokens in TOKENS:
            for op, dim, fp8 in (("rms_norm", shapes.hidden_size, False), ("rms_norm_fp8", shapes.q_lora_rank, True)):
                moved = floor_bytes(num_tokens, dim, fp8)
                weight = torch.rand(dim, device="cuda") + 0.5
                inputs = [torch.randn(num_tokens, dim, device="cuda").bfloat16() for _ in range(num_copies(moved))]
                error = relative_error(rms_norm(inputs[0], weight, EPS), reference.rms_norm(inputs[0], weight, EPS))
                run = rms_norm_fp8 if fp8 else rms_norm
                calls = [lambda x=x, w=weight, run=run: run(x, w, EPS) for x in inputs]
                yield measure(calls, moved, 4 * num_tokens * dim).as_line(
                    op=op, implementation="triton", shapes=name, num_tokens=num_tokens, relative_error=error
                )


if __name__ == "__main__":
    write_lines(lines())
