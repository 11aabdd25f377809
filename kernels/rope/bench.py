"""Time of a step's rotations against their floor, on a GPU: `python -m dsv4_kernels.rope.bench OUT.jsonl`.

Bytes: positions read, a float32 pair written for each turned pair, ratio and row. Launches decide with few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from dsv4_kernels.benching import Measured, measure, num_copies, relative_error, write_lines
from dsv4_kernels.cases import MODELS, released
from dsv4_kernels.rope import rope_frequencies, rope_table
from dsv4_kernels.rope.triton import rope_tables

TOKENS = (1, 16, 64, 256, 2048, 8192)
RATIOS = (1, 4, 128)  # of a step with compressed layers
CONTEXT = 65_536
FLOPS = 45  # of a cosine and a sine, in float64


def floor_bytes(num_tokens: int, half: int) -> int:
    """Bytes that the tables of one step must move."""
    return num_tokens * (4 + 8 * half * len(RATIOS)) + 4 * half


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """All ratios at random positions, for each model and number of tokens."""
    for name, shapes in released(models):
        half = shapes.qk_rope_head_dim // 2
        frequencies = rope_frequencies(2 * half, 160_000.0, None).to("cuda", torch.float32)
        for num_tokens in TOKENS:
            moved = floor_bytes(num_tokens, half)
            inputs = [torch.randint(CONTEXT, (num_tokens,), device="cuda").int() for _ in range(num_copies(moved))]
            found, expected = rope_tables(inputs[0], frequencies)[0], rope_table(inputs[0], frequencies)
            error = relative_error(torch.view_as_real(found), torch.view_as_real(expected))
            calls = [lambda x=x, f=frequencies: rope_tables(x, f, RATIOS) for x in inputs]
            yield measure(calls, moved, FLOPS * num_tokens * half * len(RATIOS)).as_line(
                op="rope_tables", implementation="triton", shapes=name, num_tokens=num_tokens, relative_error=error
            )


if __name__ == "__main__":
    write_lines(lines())
