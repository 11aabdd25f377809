"""What the bench.py of every operation shares: device times against the floor of this card, and their JSON lines.

A floor is the larger of bytes / (rate of a large copy) and FLOPs / (rate of a large matrix product of the library);
both rates are measured once per process.

Every bench.py has `lines(models, measure)`, which yields the lines of its operation. `benchmarks/kernels.py` runs them
all, first with `compile_only`.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROTATED_BYTES = 512 << 20  # inputs rotate through so much, so that L2 does not hold them
MAX_COPIES = 64
SAMPLE_S, MEASUREMENT_S = 1e-3, 0.05  # device time of one sample and of all samples of a measurement, about
SAMPLE_CALLS, SAMPLES = (1, 16), (3, 20)  # least and most
CYCLES_PER_S = 2e9  # at least the clock of the card
PEAK_SIDE = 8192  # of the square matrices whose product gives the matmul rates


@dataclass(frozen=True)
class Measured:
    """Median time of one call, and what it says about the card."""

    us: float
    moved_bytes: int
    flops: int
    copy_rate: float  # bytes per second
    matmul_rate: float  # FLOP per second

    @property
    def gb_per_s(self) -> float:
        """Needed bytes over the time."""
        return self.moved_bytes / self.us * 1e-3

    @property
    def tflop_per_s(self) -> float:
        """Needed operations over the time."""
        return self.flops / self.us * 1e-6

    @property
    def times_floor(self) -> float:
        """Time over the least that the bytes or the operations take; 1 is perfect."""
        return self.us * 1e-6 / max(self.moved_bytes / self.copy_rate, self.flops / self.matmul_rate)

    @property
    def bound(self) -> str:
        """Which of the two floors is the higher: "bytes" or "flops"."""
        return "bytes" if self.moved_bytes / self.copy_rate >= self.flops / self.matmul_rate else "flops"

    def as_line(self, *, op: str, implementation: str, shapes: str, num_tokens: int, **more: Any) -> dict[str, Any]:
        """A line of the results file; `more` is whatever else the operation has to say."""
        return {
            "op": op,
            "implementation": implementation,
            "shapes": shapes,
            "num_tokens": num_tokens,
            "us": round(self.us, 2),
            "bytes": self.moved_bytes,
            "gb_per_s": round(self.gb_per_s, 1),
            "tflop_per_s": round(self.tflop_per_s, 2),
            "times_floor": round(self.times_floor, 2),
            "bound": self.bound,
            "copy_gb_per_s": round(self.copy_rate * 1e-9, 1),
            **more,
            "device": torch.cuda.get_device_name(),
        }


def num_copies(moved_bytes: int) -> int:
    """How many sets of inputs of this size a measurement should rotate through."""
    return max(1, min(MAX_COPIES, -(-ROTATED_BYTES // max(1, moved_bytes))))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; NaN if anything is. Raises ValueError for different shapes."""
    if found.shape != expected.shape:
        raise ValueError(f"relative_error: found is {list(found.shape)}, expected {list(expected.shape)}")
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def measure(calls: Sequence[Callable[[], object]], moved_bytes: int, flops: int, peak: str = "bf16") -> Measured:
    """Median device time of one of `calls`, which do the same on different inputs and are called in turn.

    Args:
        moved_bytes, flops: what one call must move through device memory and compute.
        peak: "bf16", "fp8" or "tf32", the format whose matmul rate is the floor.
    """
    return Measured(_median_s(calls) * 1e6, moved_bytes, flops, copy_rate(), matmul_rate(peak))


def compile_only(calls: Sequence[Callable[[], object]], moved_bytes: int, flops: int, peak: str = "bf16") -> Measured:
    """In the place of `measure`: one call, which compiles what it needs; the numbers mean nothing."""
    calls[0]()
    return Measured(math.nan, moved_bytes, flops, 1.0, 1.0)


def write_lines(lines: Iterable[dict[str, Any]]) -> None:
    """Command line of a bench.py: append the lines to the file that the first argument names; print a short form."""
    with Path(sys.argv[1]).open("a", encoding="utf-8") as file:
        for line in lines:
            print(json.dumps(line), file=file, flush=True)
            keys = ("op", "shapes", "num_tokens", "implementation")
            errors = {key: value for key, value in line.items() if key.startswith("relative_error")}
            print(
                *(line[key] for key in keys), line["us"], "us", line["times_floor"], "x", *errors.values(), flush=True
            )


@lru_cache
def copy_rate() -> float:
    """Bytes per second of a device-to-device copy, read and written: the bandwidth that can be had."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_s([lambda: target.copy_(source)])


@lru_cache
def matmul_rate(peak: str) -> float:
    """FLOP per second of the library on two large random matrices: "bf16", "fp8" (not its fast sums) or "tf32"."""
    side = PEAK_SIDE
    left, right = (torch.randn(side, side, device="cuda") for _ in range(2))
    if peak == "tf32":
        settings = torch.backends.cuda.matmul
        before, settings.fp32_precision = settings.fp32_precision, "tf32"
        seconds = _median_s([lambda: left @ right])
        settings.fp32_precision = before
    elif peak == "bf16":
        narrow, other = left.bfloat16(), right.bfloat16()
        seconds = _median_s([lambda: narrow @ other])
    elif peak == "fp8":
        one = torch.ones((), device="cuda")
        codes, others = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
        seconds = _median_s([lambda: torch._scaled_mm(codes, others, one, one, out_dtype=torch.bfloat16)])
    else:
        raise ValueError(f"matmul_rate: {peak!r} is not one of bf16, fp8, tf32")
    return 2 * side**3 / seconds


def _median_s(calls: Sequence[Callable[[], object]]) -> float:
    """Median seconds of a call over samples of a few calls in turn, each queued as a whole before it starts.

    So that launches from Python do not count: the stream sleeps while they are queued. A call that waits for the device
    is timed with its gaps.
    """
    for call in calls:  # compiles, and allocates
        call()
    queued_s, single_s = _sample(calls[:1], 0.0)
    single_s = max(single_s, 1e-6)  # below, events see nothing
    num_calls = min(max(int(SAMPLE_S / single_s), SAMPLE_CALLS[0]), SAMPLE_CALLS[1])
    num_samples = min(max(int(MEASUREMENT_S / (single_s * num_calls)), SAMPLES[0]), SAMPLES[1])
    turn = itertools.cycle(calls)
    samples = []
    for _ in range(num_samples):
        _, sample_s = _sample([next(turn) for _ in range(num_calls)], 2 * queued_s * num_calls)
        samples.append(sample_s / num_calls)
    return median(samples)


def _sample(calls: Sequence[Callable[[], object]], sleep_s: float) -> tuple[float, float]:
    """Seconds that the host took to queue the calls, and seconds that the device took to run them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(sleep_s * CYCLES_PER_S))
    start.record()
    began = time.perf_counter()
    for call in calls:
        call()
    queued_s = time.perf_counter() - began
    end.record()
    end.synchronize()
    return queued_s, start.elapsed_time(end) * 1e-3
