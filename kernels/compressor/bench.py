"""Time of the compressors of one layer, on a GPU: `python -m dsv4_kernels.compressor.bench OUT.jsonl`.

Bytes and FLOPs: `Case.moved_bytes` and `Case.flops`. Memory decides at every size; a decode step is mostly one launch.
Steps of few rows are read from L2, where the projection has just written them.
The compressors of Pro and Flash have the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch

from dsv4_kernels.benching import Measured, measure, num_copies, relative_error, write_lines
from dsv4_kernels.cases import MODELS
from dsv4_kernels.compressor.cases import INDEX, MAIN, Case, compress
from dsv4_kernels.kv_store import decode
from dsv4_kernels.metadata import C4, C128

# Decoding requests stand at all offsets in a block, the first at its end, far enough in for a full history.
DECODE = tuple(Case("decode", tuple(range(1151, 1151 + size)), (1,) * size) for size in (1, 16, 64, 256))
CASES = (*DECODE, Case("verify", tuple(range(1151, 1151 + 64)), (4,) * 64), Case("chunk", (8192,), (2048,)))
COMPRESSORS = {
    "c4": (C4, (MAIN, INDEX)),
    "c128": (C128, (MAIN,)),
}
MOST_COPIES = 8  # cases are made on the host


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """One line for each compressor and step; the models do not differ."""
    for name, (ratio, formats) in COMPRESSORS.items():
        for case in CASES:
            moved = sum(case.moved_bytes(ratio, each) for each in formats)
            copies = min(num_copies(moved), MOST_COPIES)
            made = [[case.make(ratio, each, seed, device="cuda") for each in formats] for seed in range(copies)]
            calls = [partial(compress, ratio, *(arguments for arguments, _ in each)) for each in made]
            calls[0]()
            errors = []
            for row_format, (arguments, expect) in zip(formats, made[0], strict=True):
                expected = expect()
                found = tuple(plane[expected.entry_rows.cuda()].cpu() for plane in arguments["planes"])
                errors.append(relative_error(decode(found, row_format), decode(expected.planes, row_format)))
            flops = sum(case.flops(ratio, each.dim) for each in formats)
            yield measure(calls, moved, flops, peak="tf32").as_line(
                op="compress",
                implementation="triton",
                shapes=f"{name} {case.name}",
                num_tokens=sum(case.counts),
                relative_error=max(errors),
            )


if __name__ == "__main__":
    torch.manual_seed(0)
    write_lines(lines())
