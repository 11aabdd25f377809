"""Time of the indexer of one layer, on a GPU: `python -m dsv4_kernels.indexer.bench OUT.jsonl`.

Bytes and FLOPs: `Case.moved_bytes` and `Case.flops`. With 64 heads a key of 68 bytes meets 16,576 operations, so even a
decode step is bound by arithmetic about as much as by memory. Queries, of attention and index: read and written once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch

from dsv4_kernels.benching import Measured, measure, num_copies, relative_error, write_lines
from dsv4_kernels.cases import MODELS, Shapes, released
from dsv4_kernels.indexer.cases import FLASH_TOP_K, HEADS, PRO_TOP_K, Case, Queries, row_scores
from dsv4_kernels.indexer.queries import prepare_queries
from dsv4_kernels.indexer.triton import select

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
    for name, shapes in released(models):
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
            yield queries(name, shapes, num_tokens, measure)


def queries(name: str, shapes: Shapes, num_tokens: int, measure: Callable[..., Measured]) -> dict[str, Any]:
    """The line of `prepare_queries`; its error is that of index queries. Calls prepare their heads again and again."""
    rows = Case("queries", (0,), (num_tokens,)).make(HEADS, PRO_TOP_K, 0, device="cuda")["rows"]
    case = Queries(rows, shapes.num_attention_heads, HEADS, shapes.head_dim)
    moved = case.moved_bytes()
    made = [case.make(seed) for seed in range(min(8, num_copies(moved)))]
    _, expected, _ = case.split(made[0])
    error = relative_error(prepare_queries(**made[0])[1], expected)
    calls = [partial(prepare_queries, **arguments) for arguments in made]
    return measure(calls, moved, case.flops()).as_line(
        op="prepare_queries", implementation="triton", shapes=name, num_tokens=num_tokens, relative_error=error
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    write_lines(lines())
