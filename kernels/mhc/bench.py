"""Time of the mHC boundary against its floor, on a GPU: `python -m dsv4_kernels.mhc.bench OUT.jsonl`.

Bytes: the old streams (4 D) and the output (D) are read, the new streams (4 D) and x (D) written, BF16; fn is read
once.
FLOPs: 2 * 24 * 4 D for the mixes, 2 * 16 D for the new streams, 2 * 4 D for the merge. Memory decides at every size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from dsv4_kernels.cases import FLASH, PRO, Shapes
from dsv4_kernels.mhc import reference
from dsv4_kernels.mhc import triton as fused
from dsv4_kernels.mhc.cases import Case
from dsv4_kernels.norm.reference import rms_norm

TOKENS = (1, 16, 64, 256, 2048, 8192)
COPIES_BYTES = 512 << 20  # inputs rotate through so much, so that L2 does not hold them


def floor_bytes(num_tokens: int, hidden: int) -> int:
    """Bytes that one boundary must move."""
    return num_tokens * 10 * hidden * 2 + 24 * 4 * hidden * 4


def flops(num_tokens: int, hidden: int) -> int:
    """Floating-point operations of one boundary."""
    return num_tokens * hidden * (2 * 24 * 4 + 2 * 16 + 2 * 4)


def copy_rate() -> float:
    """Bytes per second of a device-to-device copy, read and written: the bandwidth that can be had."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)


def boundary_reference(output: Any, post: Any, comb: Any, streams: Any, norm: Any, **inputs: Any) -> Any:
    """The same by the references."""
    streams = reference.mhc_post(output, streams, post, comb)
    merged, post, comb = reference.mhc_pre(streams, **inputs)
    return streams, rms_norm(merged, norm, inputs["norm_eps"]), post, comb


def measure(name: str, shapes: Shapes, num_tokens: int, rate: float) -> list[dict[str, Any]]:
    """One line for each implementation."""
    copies = max(1, min(64, COPIES_BYTES // (num_tokens * shapes.hidden_size * 20)))
    cases = []
    for seed in range(copies):
        made = Case(name, num_tokens, shapes).make(seed, torch.bfloat16)
        inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in made.items()}
        _, post, comb = reference.mhc_pre(**inputs)
        norm = torch.rand(shapes.hidden_size, device="cuda") + 0.5
        cases.append(
            {"output": inputs["streams"][:, 0].contiguous(), "post": post, "comb": comb, "norm": norm} | inputs
        )
    implementations: dict[str, Callable[..., Any]] = {"triton": fused.mhc_boundary, "reference": boundary_reference}
    errors = [
        float((found.float() - expected.float()).norm() / expected.float().norm())
        for found, expected in zip(fused.mhc_boundary(**cases[0]), boundary_reference(**cases[0]), strict=True)
    ]
    lines = []
    for label, run in implementations.items():
        turn = iter(range(1 << 60))
        median_ms = do_bench(lambda run=run, turn=turn: run(**cases[next(turn) % copies]), return_mode="median")
        moved = floor_bytes(num_tokens, shapes.hidden_size)
        lines.append(
            {
                "op": "mhc_boundary",
                "implementation": label,
                "shapes": name,
                "num_tokens": num_tokens,
                "us": round(median_ms * 1e3, 2),
                "bytes": moved,
                "gb_per_s": round(moved / median_ms * 1e-6, 1),
                "tflop_per_s": round(flops(num_tokens, shapes.hidden_size) / median_ms * 1e-9, 2),
                "times_floor": round(median_ms * 1e-3 * rate / moved, 2),
                "copy_gb_per_s": round(rate * 1e-9, 1),
                "relative_errors": errors,
                "device": torch.cuda.get_device_name(),
            }
        )
    return lines


def main() -> None:
    """Command line."""
    torch.set_default_device("cpu")
    rate = copy_rate()
    with Path(sys.argv[1]).open("a", encoding="utf-8") as file:
        for name, shapes in (("pro", PRO), ("flash", FLASH)):
            for num_tokens in TOKENS:
                for line in measure(name, shapes, num_tokens, rate):
                    print(json.dumps(line), file=file)
                    print(
                        line["shapes"], num_tokens, line["implementation"], line["us"], "us", line["times_floor"], "x"
                    )


if __name__ == "__main__":
    main()
