"""Time of the indexer of one layer, on a GPU: `python -m dsv4_kernels.indexer.bench OUT.jsonl`.

Bytes and FLOPs: `Case.moved_bytes` and `Case.flops`. With 64 heads a key of 68 bytes meets 16,576 operations, so even a
decode step is bound by arithmetic about as much as by memory. Queries: read, transformed and written once, BF16.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch

from dsv4_kernels.benching import Measured, measure, num_copies, relative_error, write_lines
from dsv4_kernels.cases import MODELS, released
from dsv4_kernels.indexer.cases import FLASH_TOP_K, HEADS, KEYS, PRO_TOP_K, ROPE_DIM, Case, row_scores
from dsv4_kernels.indexer.triton import prepare_index_q, select
from dsv4_kernels.quant import fake_quantize_fp4, hadamard
from dsv4_kernels.rope import apply_rope, rope_frequencies, rope_table

TOP_K = {"pro": PRO_TOP_K, "flash": FLASH_TOP_K}
DECODE = [(size, context) for context in (8 << 10, 64 << 10, 256 << 10, 1 << 20) for size in (1, 16, 64)]
STEPS = [
    *(Case(f"decode {context >> 10}K", (context - 1,) * size, (1,) * size) for size, context in DECODE),
    *(Case(f"chunk {context >> 10}K", (context - 2048,), (2048,)) for context in (8 << 10, 64 << 10)),
]


def disputed(case: Case, arguments: dict[str, Any]) -> float:
    """Share of the last row's choice that is not the reference's, but for scores within a step of the threshold."""
    chosen = select(**arguments)[sum(case.counts) - 1]
    scores = row_scores(arguments, sum(case.counts) - 1).float()
    threshold = scores.topk(min(arguments["top_k"], len(scores))).values[-1]
    clear = torch.zeros_like(scores, dtype=torch.bool)
    clear[chosen[chosen >= 0].long()] = True
    wrong = clear != (scores >= threshold)
    return float((wrong & ((scores - threshold).abs() > 2.0**-7 * threshold.abs())).sum()) / len(chosen)


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """One line for each step and model; the models differ in top_k."""
    for name, _ in released(models):
        top_k = TOP_K[name]
        for case in STEPS:
            moved = case.moved_bytes(HEADS, top_k)
            made = [case.make(HEADS, top_k, seed, device="cuda") for seed in range(num_copies(moved))]
            error = disputed(case, made[0])
            calls = [partial(select, **arguments) for arguments in made]
            yield measure(calls, moved, case.flops(HEADS, top_k)).as_line(
                op="index_select",
                implementation="triton",
                shapes=f"{name} {case.name}",
                num_tokens=sum(case.counts),
                relative_error=error,
            )
    for num_tokens in (1, 64, 2048):
        yield queries(num_tokens, measure)


def queries(num_tokens: int, measure: Callable[..., Measured]) -> dict[str, Any]:
    """The line of `prepare_index_q`."""
    rows = Case("queries", (0,), (num_tokens,)).make(HEADS, PRO_TOP_K, 0, device="cuda")["rows"]
    frequencies = rope_frequencies(ROPE_DIM, 160000.0, (16, 65536, 32, 1))
    rotations = rope_table(torch.arange(num_tokens, device="cuda"), frequencies)
    moved = num_tokens * (4 * HEADS * KEYS.dim + 6 * HEADS + 4 * ROPE_DIM)
    scale = (HEADS * KEYS.dim) ** -0.5
    made = [
        (
            torch.randn(num_tokens, HEADS, KEYS.dim, device="cuda").bfloat16(),
            torch.randn(num_tokens, HEADS, device="cuda"),
        )
        for _ in range(num_copies(moved))
    ]
    expected = fake_quantize_fp4(hadamard(apply_rope(made[0][0], rotations)).bfloat16())
    error = relative_error(prepare_index_q(*made[0], rotations, rows, scale)[0], expected)
    calls = [partial(prepare_index_q, q, weights, rotations, rows, scale) for q, weights in made]
    return measure(calls, moved, num_tokens * HEADS * KEYS.dim * (2 * KEYS.dim + 10)).as_line(
        op="prepare_index_q", implementation="triton", shapes="pro", num_tokens=num_tokens, relative_error=error
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    write_lines(lines())
