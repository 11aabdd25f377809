"""Time of the mHC boundary against its floor, on a GPU: `python -m dsv4_kernels.mhc.bench OUT.jsonl`.

Bytes: the old streams (4 D) and the output (D) are read, the new streams (4 D) and x (D) written, BF16; fn is read
once.
FLOPs: 2 * 24 * 4 D for the mixes, 2 * 16 D for the new streams, 2 * 4 D for the merge. Memory decides at every size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from dsv4_kernels.benching import Measured, measure, num_copies, relative_error, write_lines
from dsv4_kernels.cases import MODELS, Shapes, released
from dsv4_kernels.mhc import reference
from dsv4_kernels.mhc import triton as fused
from dsv4_kernels.mhc.cases import Case
from dsv4_kernels.norm.reference import rms_norm

TOKENS = (1, 16, 64, 256, 2048, 8192)


def floor_bytes(num_tokens: int, hidden: int) -> int:
    """Bytes that one boundary must move."""
    return num_tokens * 10 * hidden * 2 + 24 * 4 * hidden * 4


def flops(num_tokens: int, hidden: int) -> int:
    """Floating-point operations of one boundary."""
    return num_tokens * hidden * (2 * 24 * 4 + 2 * 16 + 2 * 4)


def boundary_reference(output: Any, post: Any, comb: Any, streams: Any, norm: Any, **inputs: Any) -> Any:
    """The same by the references."""
    streams = reference.mhc_post(output, streams, post, comb)
    merged, post, comb = reference.mhc_pre(streams, **inputs)
    return streams, rms_norm(merged, norm, inputs["norm_eps"]), post, comb


def make(name: str, shapes: Shapes, num_tokens: int, seed: int) -> dict[str, Any]:
    """Keyword arguments of `mhc_boundary` on the GPU."""
    made = Case(name, num_tokens, shapes).make(seed, torch.bfloat16)
    inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in made.items()}
    _, post, comb = reference.mhc_pre(**inputs)
    norm = torch.rand(shapes.hidden_size, device="cuda") + 0.5
    return {"output": inputs["streams"][:, 0].contiguous(), "post": post, "comb": comb, "norm": norm} | inputs


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """One line for each implementation, model and number of tokens."""
    implementations: dict[str, Callable[..., Any]] = {"triton": fused.mhc_boundary, "reference": boundary_reference}
    for name, shapes in released(models):
        for num_tokens in TOKENS:
            moved, work = floor_bytes(num_tokens, shapes.hidden_size), flops(num_tokens, shapes.hidden_size)
            cases = [make(name, shapes, num_tokens, seed) for seed in range(num_copies(moved))]
            found, expected = fused.mhc_boundary(**cases[0]), boundary_reference(**cases[0])
            errors = [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
            for label, run in implementations.items():
                calls = [lambda run=run, case=case: run(**case) for case in cases]
                yield measure(calls, moved, work, peak="tf32").as_line(
                    op="mhc_boundary",
                    implementation=label,
                    shapes=name,
                    num_tokens=num_tokens,
                    relative_errors=errors,
                )


if __name__ == "__main__":
    write_lines(lines())
