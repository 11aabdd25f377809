"""Time of the mHC boundary against its floor, on a GPU: `python -m dsv4_kernels.mhc.bench OUT.jsonl`.

Bytes: the old streams (4 D) and the n parts of the output (n D) are read, the new streams (4 D) and x (D) written, all
BF16, and x in E4M3 (D + D / 128); fn is read once.
FLOPs: 2 * 24 * 4 D for the mixes, 2 * 16 D for the new streams, n D for their output, 2 * 4 D for the merge. Memory
decides at every size. Attention gives one part; the experts of a token give one each, the shared one too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.benching import Measured, measure, num_copies, relative_error, write_lines
from dsv4_kernels.cases import MODELS, Shapes, released
from dsv4_kernels.mhc import reference
from dsv4_kernels.mhc import triton as fused
from dsv4_kernels.mhc.cases import Case
from dsv4_kernels.norm.reference import rms_norm

TOKENS = (1, 16, 64, 256, 2048, 8192)


def floor_bytes(num_tokens: int, hidden: int, num_parts: int) -> int:
    """Bytes that one boundary must move."""
    return num_tokens * ((9 + num_parts) * hidden * 2 + hidden + hidden // 128) + 24 * 4 * hidden * 4


def flops(num_tokens: int, hidden: int, num_parts: int) -> int:
    """Floating-point operations of one boundary."""
    return num_tokens * hidden * (2 * 24 * 4 + 2 * 16 + num_parts + 2 * 4)


def boundary(**inputs: Any) -> tuple[Tensor, ...]:
    """What `mhc_boundary` gives, without x in E4M3, of which tests compare the bits."""
    streams, x, _, post, comb = fused.mhc_boundary(**inputs)
    return streams, x, post, comb


def boundary_reference(output: Tensor, post: Tensor, comb: Tensor, streams: Tensor, norm: Tensor, **inputs: Any) -> Any:
    """The same by the references."""
    total = output.float().sum(1).to(output.dtype)
    streams = reference.mhc_post(total, streams, post, comb)
    merged, post, comb = reference.mhc_pre(streams, **inputs)
    return streams, rms_norm(merged, norm, inputs["norm_eps"]), post, comb


def make(name: str, shapes: Shapes, num_tokens: int, num_parts: int, seed: int) -> dict[str, Any]:
    """Keyword arguments of `mhc_boundary` on the GPU."""
    made = Case(name, num_tokens, shapes).make(seed, torch.bfloat16)
    inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in made.items()}
    _, post, comb = reference.mhc_pre(**inputs)
    norm = torch.rand(shapes.hidden_size, device="cuda") + 0.5
    output = torch.randn(num_tokens, num_parts, shapes.hidden_size, device="cuda").bfloat16()
    return {"output": output, "post": post, "comb": comb, "norm": norm} | inputs


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """One line for each implementation, model, number of parts and number of tokens."""
    implementations: dict[str, Callable[..., Any]] = {"triton": fused.mhc_boundary, "reference": boundary_reference}
    for name, shapes in released(models):
        for num_parts, num_tokens in itertools.product((1, shapes.num_experts_per_tok + 1), TOKENS):
            size = num_tokens, shapes.hidden_size, num_parts
            moved, work = floor_bytes(*size), flops(*size)
            cases = [make(name, shapes, num_tokens, num_parts, seed) for seed in range(num_copies(moved))]
            found, expected = boundary(**cases[0]), boundary_reference(**cases[0])
            errors = [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
            for label, run in implementations.items():
                calls = [lambda run=run, case=case: run(**case) for case in cases]
                yield measure(calls, moved, work, peak="tf32").as_line(
                    op="mhc_boundary",
                    implementation=label,
                    shapes=name,
                    num_tokens=num_tokens,
                    num_parts=num_parts,
                    relative_errors=errors,
                )


if __name__ == "__main__":
    write_lines(lines())
