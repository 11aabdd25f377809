"""Time of sparse attention against its floor, on a GPU: `python -m dsv4_kernels.sparse_attention.bench OUT.jsonl`.

FLOPs: 4 * heads * head_dim for each (row, key). Bytes: queries and outputs once, and each stored row that some row of
the request attends to once. Decode on Flash is near the ridge of an H100, on Pro and in prefill operations decide.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch

from dsv4_kernels.benching import Measured, measure, relative_error, write_lines
from dsv4_kernels.capability import is_hopper
from dsv4_kernels.cases import FLASH, MODELS, PRO
from dsv4_kernels.kv_store.cases import kv_format
from dsv4_kernels.sparse_attention.cases import Case
from dsv4_kernels.sparse_attention.triton import FEW_BLOCKS, KEYS, sparse_attention

BATCHES = (1, 16, 64, 256)
CONTEXTS = (8192, 65_536)
HISTORY, CHUNK = 8192, 2048  # positions before a prefill, and its rows
COPIES = 4
LAYERS = (
    ("pro-c4", PRO, 4, 1024),
    ("pro-c128", PRO, 128, 0),
    ("flash-c4", FLASH, 4, 512),
    ("flash-c128", FLASH, 128, 0),
)


def flops(case: Case) -> int:
    """Floating-point operations of a step."""
    return 4 * case.shapes.num_attention_heads * case.shapes.head_dim * case.num_keys


def moved_bytes(case: Case) -> int:
    """Bytes that a step must move."""
    rows = 0
    for start, count in case.requests:
        rows += min(start, case.window - 1) + count
        if case.ratio:
            entries = (start + count) // case.ratio
            rows += min(entries, count * case.top_k) if case.top_k else entries
    of_queries = 2 * 2 * case.shapes.num_attention_heads * case.shapes.head_dim + 4 * case.top_k
    return case.num_tokens * of_queries + rows * kv_format(case.shapes).row_bytes


def steps(models: Collection[str]) -> Iterator[tuple[str, Case]]:
    """Decode at each context and batch, and one prefill chunk."""
    for name, shapes, ratio, top_k in (layer for layer in LAYERS if layer[0].split("-")[0] in models):
        for context in CONTEXTS:
            for batch in BATCHES:
                requests = ((context - 1, 1),) * batch
                yield f"decode {context // 1024}k", Case(name, shapes, requests, ratio=ratio, top_k=top_k)
        yield "prefill at 8k", Case(name, shapes, ((HISTORY, CHUNK),), ratio=ratio, top_k=top_k)


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """One line for each step; the error is that of the smallest decode step."""
    kernels = [("triton", False), ("gluon", True)] if is_hopper(torch.device("cuda", 0)) else [("triton", False)]
    for what, case in steps(models):
        name = f"{case.name} {what}"
        moved, copies = moved_bytes(case), 1 if case.num_tokens > 64 else COPIES
        inputs = [case.make(seed, "cuda") for seed in range(copies)]
        for implementation, specialized in kernels:
            calls = [partial(sparse_attention, **one, specialized=specialized) for one in inputs]
            more = {}
            if case.num_tokens == 1:
                more["relative_error"] = relative_error(calls[0](), case.reference(inputs[0]))
            yield measure(calls, moved, flops(case)).as_line(
                op="sparse_attention", implementation=implementation, shapes=name, num_tokens=case.num_tokens, **more
            )
        blocks = -(-case.num_keys // case.num_tokens // KEYS)
        if blocks <= FEW_BLOCKS and case.num_tokens <= 16:  # what one launch is compared with
            calls = [partial(sparse_attention, **one, num_splits=blocks, specialized=False) for one in inputs]
            yield measure(calls, moved, flops(case)).as_line(
                op="sparse_attention", implementation="triton, split", shapes=name, num_tokens=case.num_tokens
            )


if __name__ == "__main__":
    write_lines(lines())
