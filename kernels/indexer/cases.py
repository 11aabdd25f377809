"""Ragged steps for the indexer: queries, weights and pages of keys. Used by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import Step, generator
from dsv4_kernels.indexer import reference
from dsv4_kernels.kv_store import Format, RowFormat, load
from dsv4_kernels.metadata import C4
from dsv4_kernels.metadata.rows import Rows
from dsv4_kernels.quant import fake_quantize_fp4, hadamard
from dsv4_kernels.rope import apply_rope, rope_frequencies, rope_table

PAGE_TOKENS = 256
KEYS = RowFormat(Format.INDEX_FP4, 128)
HEADS, ROPE_DIM = 64, 64  # of both released models
PRO_TOP_K, FLASH_TOP_K, DEMO_TOP_K, DEMO_HEADS = 1024, 512, 64, 4


class Case(Step):
    """One step of the indexer."""

    def rows(self) -> Rows:
        """On the CPU; the first request has the last slot, and slot 0 is nobody's."""
        slots = torch.arange(len(self.counts), 0, -1, dtype=torch.int32)
        starts, counts = (torch.tensor(values, dtype=torch.int32) for values in (self.starts, self.counts))
        return Rows.build(slots, starts, counts, self.num_rows)

    def make(
        self, num_heads: int, top_k: int, seed: int, device: str = "cpu", whole_numbers: bool = False
    ) -> dict[str, Any]:
        """Keyword arguments of `select`, made on `device`; padding rows are NaN.

        With `whole_numbers`, elements and weights are small integers, so that scores are exact in any order and full of
        ties.
        """
        random = generator(seed) if device == "cpu" else torch.Generator(device).manual_seed(seed)
        most = max((start + count for start, count in zip(self.starts, self.counts, strict=True)), default=1)
        num_slots, num_pages = len(self.counts) + 1, -(-most // PAGE_TOKENS)
        q = torch.randn(self.num_rows, num_heads, KEYS.dim, generator=random, device=device)
        weights = torch.randn(self.num_rows, num_heads, generator=random, device=device)
        if whole_numbers:
            q, weights = q.round(), weights.round()
        q[sum(self.counts) :] = torch.nan
        # Any bytes are FP4 values; with a scale of 2 they are integers.
        num_keys = num_slots * num_pages * (PAGE_TOKENS // C4)
        shapes = ((num_keys, size) for size in KEYS.plane_bytes)
        scales = (128, 129) if whole_numbers else (124, 130)
        planes = tuple(
            torch.randint(*limits, shape, generator=random, device=device, dtype=torch.uint8)
            for limits, shape in zip(((0, 256), scales), shapes, strict=True)
        )
        table = torch.randperm(num_slots * num_pages, generator=random, device=device).int()
        rows = self.rows()
        return {
            "q": fake_quantize_fp4(q).bfloat16(),
            "weights": weights.bfloat16(),
            "rows": Rows(*(value.to(device) for value in (rows.slots, rows.positions, rows.firsts, rows.counts))),
            "planes": planes,
            "row_format": KEYS,
            "page_table": table.view(num_slots, num_pages),
            "page_tokens": PAGE_TOKENS,
            "top_k": top_k,
        }

    def num_scores(self, top_k: int) -> int:
        """Scores that the step must compute: of rows that see more than `top_k` entries."""
        visible = [
            (start + step + 1) // C4
            for start, count in zip(self.starts, self.counts, strict=True)
            for step in range(count)
        ]
        return sum(number for number in visible if number > top_k)

    def moved_bytes(self, num_heads: int, top_k: int) -> int:
        """Bytes that the step must move: each request's keys once, queries and weights in, ids out."""
        entries = [(start + count) // C4 for start, count in zip(self.starts, self.counts, strict=True)]
        keys = KEYS.row_bytes * sum(number for number in entries if number > top_k)
        return keys + sum(self.counts) * (2 * num_heads * (KEYS.dim + 1) + 4 * top_k)

    def flops(self, num_heads: int, top_k: int) -> int:
        """Operations: 2 * d for a dot, and relu, product and sum, for each head of a score."""
        return self.num_scores(top_k) * num_heads * (2 * KEYS.dim + 3)


@dataclass(frozen=True)
class Queries:
    """All queries of a C4 layer, those of the index with KEYS.dim dims."""

    rows: Rows
    num_heads: int
    index_heads: int
    head_dim: int

    def make(self, seed: int) -> dict[str, Any]:
        """Keyword arguments of `prepare_queries` on the device of `rows`; queries and weights are parts of wider
        rows, as the projections give them."""
        num_rows, device = len(self.rows.positions), self.rows.positions.device
        random = torch.Generator(device).manual_seed(seed)
        columns = self.num_heads * self.head_dim + self.index_heads * KEYS.dim
        queries, weights = (
            torch.randn(num_rows, 64 + width, generator=random, device=device) for width in (columns, self.index_heads)
        )
        frequencies = rope_frequencies(ROPE_DIM, 160000.0, (16, 65536, 32, 1))
        return {
            "queries": queries.bfloat16()[:, 64:],
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "eps": 1e-6,
            "weights": weights[:, 64:],
            "scale": (self.index_heads * KEYS.dim) ** -0.5,
            "rotations": rope_table(self.rows.positions.clamp_min(0).long(), frequencies),
            "rows": self.rows,
        }

    def split(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Of what `make` gave: the raw heads, and index queries and weights as the reference prepares them."""
        heads, index_q = arguments["queries"].split([self.num_heads * self.head_dim, self.index_heads * KEYS.dim], 1)
        turned = apply_rope(index_q.unflatten(1, (self.index_heads, KEYS.dim)), arguments["rotations"])
        return (
            heads.unflatten(1, (self.num_heads, self.head_dim)),
            fake_quantize_fp4(hadamard(turned).bfloat16()),
            arguments["weights"].bfloat16() * arguments["scale"],
        )

    def moved_bytes(self) -> int:
        """Bytes that must move: heads in and out, index queries and weights in and out, rotations."""
        heads = 4 * self.num_heads * self.head_dim
        return len(self.rows.positions) * (
            heads + 4 * self.index_heads * KEYS.dim + 6 * self.index_heads + 4 * ROPE_DIM
        )

    def flops(self) -> int:
        """Operations: norm and rotation of heads; the Hadamard product of index queries, rotation and rounding."""
        index = self.index_heads * KEYS.dim * (2 * KEYS.dim + 10)
        return len(self.rows.positions) * (4 * self.num_heads * self.head_dim + index)


def row_scores(arguments: dict[str, Any], row: int) -> Tensor:
    """What the reference scores the entries that a row sees: bf16 [visible], on the device of the arguments."""
    rows, table = arguments["rows"], arguments["page_table"]
    per_page = arguments["page_tokens"] // C4
    entry = torch.arange((int(rows.positions[row]) + 1) // C4, device=table.device)
    page_rows = table[int(rows.slots[row]), entry // per_page].long() * per_page + entry % per_page
    keys = load(arguments["planes"], page_rows, arguments["row_format"])
    return reference.index_scores(arguments["q"][None, None, row], arguments["weights"][None, None, row], keys[None])[
        0, 0
    ]


CASES = (
    Case("decode", (0, 70, 300, 1030, 2047), (1,) * 5),
    Case("verify", (1, 250, 1021, 1799), (3, 2, 4, 3)),
    Case("mixed", (0, 640, 3, 1280), (1, 37, 20, 2), num_padding=3),
    Case("empty", (), ()),
)
