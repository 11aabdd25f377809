"""Named inputs of `sparse_attention`: `sparse_attention(**case.make(seed))` in kernels/sparse_attention/triton.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4_kernels.cases import DEMO, FLASH, PRO
from dsv4_kernels.kv_store.cases import MIXED, SMALL, Step, kv_format, poisoned_planes
from dsv4_kernels.kv_store.reference import KV_GROUP, Planes, RowFormat, decode, take_rows
from dsv4_kernels.metadata import C4, StepMetadata
from dsv4_kernels.sparse_attention.reference import Keys, sparse_attention

PAGE_TOKENS = 256
MAX_PAGES = 4096  # of the pool; longer contexts share pages


def random_rows(random: torch.Generator, num_rows: int, row_format: RowFormat) -> Planes:
    """Any KV_FP8 rows with values near one; drawn as bytes, because pools are large."""
    nope, device = row_format.dim - row_format.rope_dim, random.device
    codes = torch.randint(0, 255, (num_rows, nope), generator=random, device=device, dtype=torch.uint8)
    codes -= (codes == 0x7F).to(torch.uint8)  # NaN, as 0xff, which is not drawn
    tail = torch.randn(num_rows, row_format.rope_dim, generator=random, device=device).bfloat16()
    scale = torch.randint(118, 121, (num_rows, row_format.plane_bytes[1]), generator=random, device=device)
    scale[:, nope // KV_GROUP :] = 0
    return torch.cat([codes, tail.view(torch.uint8)], dim=1), scale.to(torch.uint8)


@dataclass(frozen=True)
class Case(Step):
    """A step over histories of the given lengths. Rows that no row of the step may see are NaN."""

    ratio: int = 0
    top_k: int = 0  # with C4: entries that a row chooses; 0 = it attends to all

    def make(self, seed: int, device: str = "cpu") -> dict[str, Any]:
        """Keyword arguments of the Triton `sparse_attention`."""
        random = torch.Generator(device).manual_seed(seed)
        rows, sizes, row_format = self.rows(device), self.shapes, kv_format(self.shapes)
        num_rows = len(rows.slots)
        step, ring = (poisoned_planes(n, row_format, device) for n in (num_rows, self.num_slots * self.ring_rows))
        _write(step, torch.arange(self.num_tokens, device=device), random, row_format)
        for slot, (start, _) in zip(self.slots, self.requests, strict=True):
            live = torch.arange(max(0, start - self.window + 1), start, device=device) % self.ring_rows
            _write(ring, slot * self.ring_rows + live, random, row_format)
        heads = (num_rows, sizes.num_attention_heads, sizes.head_dim)
        inputs = {
            "q": torch.randn(heads, generator=random, device=device).bfloat16(),
            "rows": rows,
            "step_planes": step,
            "ring_planes": ring,
            "ring_rows": self.ring_rows,
            "window": self.window,
            "sink": torch.randn(sizes.num_attention_heads, generator=random, device=device) + 2.0,
            "rotations": self.rotations(rows),
        }
        return inputs | self._entries(random) if self.ratio else inputs

    def _entries(self, random: torch.Generator) -> dict[str, Any]:
        row_format, per_page, device = kv_format(self.shapes), PAGE_TOKENS // self.ratio, random.device
        needed = [-(-(start + count) // PAGE_TOKENS) for start, count in self.requests]
        num_pages = min(sum(needed), MAX_PAGES)
        order = torch.randperm(num_pages, generator=random, device=device).to(torch.int32) + 1  # page 0 is free
        page_table = torch.full((self.num_slots, max(needed, default=1)), -1, dtype=torch.int32, device=device)
        shared = sum(needed) > num_pages
        planes = poisoned_planes((num_pages + 2) * per_page, row_format, str(device))
        if shared:
            planes = random_rows(random, len(planes[0]), row_format)
        taken = 0
        for slot, pages, (start, count) in zip(self.slots, needed, self.requests, strict=True):
            page_table[slot, :pages] = order[(taken + torch.arange(pages, device=device)) % num_pages]
            taken += pages
            entry = torch.arange((start + count) // self.ratio, device=device)
            entry_rows = page_table[slot, entry // per_page].long() * per_page + entry % per_page
            if not shared:
                _write(planes, entry_rows, random, row_format)
        found = {"entry_planes": planes, "page_table": page_table, "ratio": self.ratio, "page_tokens": PAGE_TOKENS}
        return found | {"chosen": self._chosen(random)} if self.top_k else found

    def _chosen(self, random: torch.Generator) -> Tensor:
        """int32 [rows, top_k]: different visible entries in any order, -1 among them where there are fewer."""
        device = random.device
        visible = ((self.rows(str(device)).positions + 1) // self.ratio)[:, None]
        most = max(self.top_k, max((start + count) // self.ratio for start, count in self.requests))
        lots = torch.rand(len(visible), most, generator=random, device=device)
        entries = lots.masked_fill(torch.arange(most, device=device) >= visible, -1.0).topk(self.top_k).indices
        entries = torch.where(entries < visible, entries, -1).to(torch.int32)
        return entries[:, torch.randperm(self.top_k, generator=random, device=device)].contiguous()

    def reference(self, inputs: dict[str, Any]) -> Tensor:
        """[rows without padding, heads, head_dim] by the reference, over the tables of the CPU engine."""
        num, ring_rows, row_format = self.num_tokens, self.ring_rows, kv_format(self.shapes)
        page_table = inputs.get("page_table", torch.zeros(self.num_slots, 1))[self.slots].cpu().numpy()
        starts, counts = (list(values) for values in zip(*self.requests, strict=True))
        metadata = StepMetadata(self.slots, starts, counts, page_table.astype(np.int64), PAGE_TOKENS)
        history, (source, target) = metadata.window(ring_rows, self.window), metadata.commit(ring_rows)
        ring, step = inputs["ring_planes"], tuple(plane[:num] for plane in inputs["step_planes"])
        if history.local:
            of_requests = (plane.unflatten(0, (-1, ring_rows))[self.slots].flatten(0, 1) for plane in ring)
            window = tuple(torch.cat(pair) for pair in zip(of_requests, step, strict=True))
        else:
            window = tuple(plane.clone() for plane in ring)
            for plane, new in zip(window, step, strict=True):
                plane[target] = new[source]
        sources = [_keys(history.table, window, row_format)]
        if self.ratio:
            chosen = inputs["chosen"][:num].cpu().long() if self.top_k else None
            table = metadata.all_entries(self.ratio) if chosen is None else metadata.c4_table(chosen)
            sources.append(_keys(table, inputs["entry_planes"], row_format))
        return sparse_attention(inputs["q"][:num], sources, inputs["sink"], inputs["rotations"][:num])

    @property
    def num_keys(self) -> int:
        """Keys that all rows together attend to."""
        total = 0
        for start, count in self.requests:
            seen = np.arange(start + 1, start + count + 1)
            total += int(np.minimum(seen, self.window).sum())
            if self.ratio:
                total += int(np.minimum(seen // self.ratio, self.top_k or len(seen) + start).sum())
        return total


def _write(planes: Planes, rows: Tensor, random: torch.Generator, row_format: RowFormat) -> None:
    for plane, new in zip(planes, random_rows(random, len(rows), row_format), strict=True):
        plane[rows] = new


def _keys(table: Tensor, planes: Planes, row_format: RowFormat) -> Keys:
    """Keys of stored rows; -1 reads a row of zeros, which is added."""
    planes = tuple(torch.cat([plane, plane.new_zeros(1, plane.shape[1])]) for plane in planes)
    return Keys(table.to(planes[0].device), lambda rows: decode(tuple(take_rows(p, rows) for p in planes), row_format))


CASES = [
    Case("pro", PRO, MIXED, num_padding=4, num_drafts=3, ratio=C4, top_k=1024),
    Case("pro-c128", PRO, MIXED, num_padding=4, ratio=128),
    Case("flash", FLASH, MIXED, num_padding=4, num_drafts=3, ratio=C4, top_k=512),
    Case("flash-window", FLASH, MIXED, num_padding=4),
    Case("demo", DEMO, SMALL, num_padding=4, num_drafts=3, ratio=C4, top_k=64),
    Case("demo-c128", DEMO, SMALL, num_padding=4, ratio=128),
    Case("one", DEMO, ((5, 1),), ratio=C4),
    Case("empty", DEMO, ()),
]
