"""Time of `store_kv` and `prepare_q` against their floors, on a GPU: `python -m dsv4_kernels.kv_store.bench OUT.jsonl`.

`store_kv` reads a bf16 row and writes its bytes to workspace and ring; `prepare_q` reads and writes all heads. Their
few operations per byte never decide.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

from dsv4_kernels.benching import Measured, measure, num_copies, write_lines
from dsv4_kernels.cases import MODELS, Shapes, released
from dsv4_kernels.kv_store.cases import Case, kv_format
from dsv4_kernels.kv_store.triton import prepare_q, store_kv

TOKENS = (1, 16, 64, 256, 2048)


def store_bytes(num_tokens: int, shapes: Shapes) -> int:
    """Bytes that `store_kv` must move when all rows enter the ring."""
    return num_tokens * (2 * shapes.head_dim + 8 * shapes.qk_rope_head_dim // 2 + 2 * kv_format(shapes).row_bytes)


def query_bytes(num_tokens: int, shapes: Shapes) -> int:
    """Bytes that `prepare_q` must move."""
    return num_tokens * (2 * 2 * shapes.num_attention_heads * shapes.head_dim + 8 * shapes.qk_rope_head_dim // 2)


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """One line for each operation, model and number of tokens."""
    for name, shapes in released(models):
        for num_tokens in TOKENS:
            case = Case(name, shapes, ((8192, 1),) * num_tokens)
            dim, heads = shapes.head_dim, shapes.num_attention_heads
            for op, make, call, moved, flops in (
                ("store_kv", case.make, store_kv, store_bytes(num_tokens, shapes), 6 * num_tokens * dim),
                ("prepare_q", case.queries, prepare_q, query_bytes(num_tokens, shapes), 4 * num_tokens * heads * dim),
            ):
                inputs = [make(seed, "cuda") for seed in range(min(8, num_copies(moved)))]
                measured = measure([partial(call, **one) for one in inputs], moved, flops)
                yield measured.as_line(op=op, implementation="triton", shapes=name, num_tokens=num_tokens)


if __name__ == "__main__":
    write_lines(lines())
