"""Ragged steps for `compress_c4` and `compress_c128`, with what they must leave behind. Used by tests and benchmarks.

Everything that must not be read is NaN (history that a ring has lost, states of fresh blocks, padding rows), and every
cache byte that a step does not write keeps the value POISON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.cases import PRO, Step, generator
from dsv4_kernels.compressor.beside import prepare_rows
from dsv4_kernels.compressor.reference import finish, online_update, pool_sequence
from dsv4_kernels.compressor.triton import C4Compressor, C128Compressor, compress_c4, compress_c128
from dsv4_kernels.gemm.fp8 import Fp8Rows
from dsv4_kernels.kv_store import Format, Planes, RowFormat, encode
from dsv4_kernels.metadata import C4, C128
from dsv4_kernels.metadata.rows import Rows
from dsv4_kernels.quant import hadamard
from dsv4_kernels.rope import rope_frequencies, rope_table

POISON = 0xA5
EPS, PAGE_TOKENS, WINDOW = 1e-6, 256, 128
MAIN = RowFormat(Format.KV_FP8, 512, 64)  # of both released models
INDEX = RowFormat(Format.INDEX_FP4, 128)


class Case(Step):
    """One step of one compressor."""

    def make(
        self, ratio: int, row_format: RowFormat, seed: int, ring_rows: int = 8, device: str = "cpu", banks: int = 1
    ) -> tuple[dict[str, Any], Callable[[], Expected]]:
        """Arguments of the kernel for `ratio` by name, and what it must leave, computed when asked.

        With the same seed and ratio all formats have the same slots and pages, so they can share a launch.
        """
        random = generator(seed)
        dim, rope_dim = row_format.dim, row_format.rope_dim or row_format.dim // 2
        width = dim * (2 if ratio == C4 else 1)  # of the kv and of the gate
        num_rows, num_slots = self.num_rows, len(self.counts) + 2
        slots = torch.randperm(num_slots, generator=random, dtype=torch.int32)[: len(self.counts)]
        starts, counts = (torch.tensor(values, dtype=torch.int32) for values in (self.starts, self.counts))
        rows = Rows.build(slots, starts, counts, num_rows)
        most = max((start + count for start, count in zip(self.starts, self.counts, strict=True)), default=0)
        num_pages = -(-max(most, 1) // PAGE_TOKENS)
        page_table = torch.randperm(num_slots * num_pages, generator=random, dtype=torch.int32).view(num_slots, -1)
        ape, norm = torch.randn(ratio, width, generator=random), torch.rand(dim, generator=random) + 0.5
        frequencies = rope_frequencies(rope_dim, 160000.0, (16, 65536, 32, 1))
        wide = torch.full((num_rows, 2 * width + 64), torch.nan)  # the compressor's columns of a wider product
        sequences = []
        for start, count, row in zip(self.starts, self.counts, _first_rows(self.counts), strict=True):
            # Rows from the first that can matter: for C4 the block before the one that the step enters.
            base = max(0, start // ratio * ratio - (C4 if ratio == C4 else 0))
            raw = torch.randn(start + count - base, 2 * width, generator=random)
            raw[:, width:] *= 3
            wide[row : row + count, 32:-32] = raw[start - base :]
            raw[:, width:] += ape[torch.arange(base, start + count) % ratio]
            sequences.append((base, raw))
        kept = (num_slots, ring_rows, 4 * dim) if ratio == C4 else (num_slots, banks, 3, dim)
        before = torch.full(kept, torch.nan)
        after = before.clone()
        for slot, start, count, (base, raw) in zip(slots.tolist(), self.starts, self.counts, sequences, strict=True):
            _keep(before[slot], raw, base, start, ratio)
            after[slot] = before[slot]
            if ratio == C4 or count > banks:
                _keep(after[slot], raw, base, start + count, ratio)
                continue
            for bank in range(count):
                _keep(after[slot, bank:], raw, base, start + bank + 1, ratio)
        num_entries = num_slots * num_pages * (PAGE_TOKENS // ratio)
        planes = tuple(
            torch.full((num_entries, size), POISON, dtype=torch.uint8, device=device) for size in row_format.plane_bytes
        )
        arguments = {
            "raw": wide.to(device)[:, 32:-32],
            "ape": ape.to(device),
            "norm": norm.to(device),
            "eps": EPS,
            "rotations": rope_table(rows.positions.long() // ratio * ratio, frequencies).to(device),
            "rows": Rows(*(values.to(device) for values in (rows.slots, rows.positions, rows.firsts, rows.counts))),
            "page_table": page_table.to(device),
            "page_tokens": PAGE_TOKENS,
            "ring" if ratio == C4 else "state": before.to(device),
            "planes": planes,
            "row_format": row_format,
        }

        def expected() -> Expected:
            entry_rows, pooled, ids = [], [], []
            for slot, start, (base, raw) in zip(slots.tolist(), self.starts, sequences, strict=True):
                skipped = (start - base) // ratio
                pooled.append(pool_sequence(raw[:, :width], raw[:, width:], ratio)[skipped:])
                entries = start // ratio + torch.arange(len(pooled[-1]))
                per_page = PAGE_TOKENS // ratio
                entry_rows.append(page_table[slot, entries // per_page].long() * per_page + entries % per_page)
                ids.append(entries)
            dtype = torch.float32 if row_format.format is Format.F32 else torch.bfloat16
            positions = torch.cat([*ids, torch.empty(0, dtype=torch.int64)]) * ratio
            values = torch.cat([*pooled, torch.empty(0, dim)])
            values = finish(values, norm, EPS, rope_table(positions, frequencies), dtype)
            if row_format.format is Format.INDEX_FP4:
                values = hadamard(values).to(dtype)
            return Expected(
                torch.cat([*entry_rows, torch.empty(0, dtype=torch.int64)]), values, encode(values, row_format), after
            )

        return arguments, expected

    def num_closed(self, ratio: int) -> int:
        """Entries that the step completes."""
        return sum((s + count) // ratio - s // ratio for s, count in zip(self.starts, self.counts, strict=True))

    def moved_bytes(self, ratio: int, row_format: RowFormat, ring_rows: int = 8) -> int:
        """Bytes that the step must move: raw rows, bias and history in, entries and history out."""
        dim = row_format.dim
        raw_row = 4 * dim * (4 if ratio == C4 else 2)
        biases = {
            (start + step) % ratio
            for start, count in zip(self.starts, self.counts, strict=True)
            for step in range(min(count, ratio))
        }
        total = raw_row * sum(self.counts) + raw_row // 2 * len(biases) + self.num_closed(ratio) * row_format.row_bytes
        for start, count in zip(self.starts, self.counts, strict=True):
            if ratio == C4:
                closed = range(start // C4, (start + count) // C4)[:2]  # a pooled row is half of a raw one
                read = sum(
                    min(4 * entry + 4, start) - max(4 * entry - 4, 0) for entry in closed if 4 * entry - 4 < start
                )
                total += raw_row * min(count, ring_rows) + raw_row // 2 * read
            else:
                total += 12 * dim * ((start % ratio > 0) + ((start + count) % ratio > 0))
        return total

    def flops(self, ratio: int, dim: int) -> int:
        """Operations of the pooling: compare, subtract, exponential, sum, product, sum for each pooled value."""
        return 6 * dim * (8 * self.num_closed(C4) if ratio == C4 else sum(self.counts))


@dataclass(frozen=True)
class Expected:
    """What a step leaves: `kept` is the whole ring or state tensor, all other page rows are POISON."""

    entry_rows: Tensor  # int64 [closed]
    values: Tensor  # [closed, dim], before the format rounds them
    planes: Planes  # rows of the closed entries
    kept: Tensor


def compress(ratio: int, *made: dict[str, Any]) -> None:
    """One launch on what `Case.make` made, for C4 of one or two formats."""
    if ratio == C128:
        compress_c128(**made[0])
        return
    compressors, shared = _compressors(C4Compressor, made)
    compress_c4(compressors, **shared)


def prepare(ratio: int, *made: dict[str, Any]) -> tuple[Fp8Rows, dict[str, Any]]:
    """`prepare_rows` on what `Case.make` made; and its arguments by name."""
    arguments = row_arguments(ratio, *made)
    return prepare_rows(**arguments), arguments


def row_arguments(ratio: int, *made: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Arguments of `prepare_rows` by name: what `Case.make` made, beside random latents of Pro."""
    random, rows = generator(seed), made[0]["rows"]
    device, num_rows = rows.slots.device, len(rows.slots)
    latent = torch.randn(num_rows, PRO.q_lora_rank + MAIN.dim, generator=random).bfloat16().to(device)
    frequencies = rope_frequencies(MAIN.rope_dim, 160000.0, (16, 65536, 32, 1))
    turns = rope_table(rows.positions.cpu().clamp_min(0).long(), frequencies).to(device)
    sizes = num_rows, len(made[0]["page_table"]) * WINDOW  # rows of the step, and of the rings
    step, ring = (
        tuple(torch.full((size, width), POISON, dtype=torch.uint8, device=device) for width in MAIN.plane_bytes)
        for size in sizes
    )
    compressors, shared = _compressors(C4Compressor if ratio == C4 else C128Compressor, made)
    arguments = {
        "query": latent[:, : PRO.q_lora_rank],
        "query_norm": torch.rand(PRO.q_lora_rank, generator=random).to(device),
        "kv": latent[:, PRO.q_lora_rank :],
        "kv_norm": torch.rand(MAIN.dim, generator=random).to(device),
        "turns": turns,
        "step_planes": step,
        "ring_planes": ring,
        "ring_rows": WINDOW,
        "window": WINDOW,
        "compressors": compressors if ratio == C4 else compressors[0],
    }
    return arguments | shared


def _compressors(kind: type, made: Sequence[dict[str, Any]]) -> tuple[list[Any], dict[str, Any]]:
    """A compressor of each of `made`, and the arguments that they share."""
    own = {field.name for field in fields(kind)}
    shared = {name: value for name, value in made[0].items() if name not in own}
    return [kind(**{name: each[name] for name in own}) for each in made], shared


def _first_rows(counts: tuple[int, ...]) -> list[int]:
    return [sum(counts[:request]) for request in range(len(counts))]


def _keep(kept: Tensor, raw: Tensor, base: int, length: int, ratio: int) -> None:
    """Bring a slot's ring [ring_rows, 4 * dim], or the first of states [banks, 3, dim], to `length` positions.

    Raw rows begin at position `base`.
    """
    if ratio == C4:
        for position in range(max(base, length - len(kept)), length):
            kept[position % len(kept)] = raw[position - base]
        return
    block = length // ratio * ratio
    if block < length:
        kv, gate = raw[None, block - base : length - base].chunk(2, dim=-1)
        present = torch.ones(1, length - block, dtype=torch.bool)
        kept[:1] = online_update(kept[:1], torch.tensor([True]), kv, gate, present)


CASES = (
    Case("decode", (0, 3, 4, 7, 126, 127, 128, 511), (1,) * 8),
    Case("verify", (0, 2, 3, 5, 125, 127, 253, 510), (3, 2, 4, 3, 4, 2, 4, 3)),
    Case("mixed", (0, 130, 3, 256, 7, 383), (9, 1, 20, 10, 2, 130), num_padding=3),
    Case("empty", (), ()),
)
