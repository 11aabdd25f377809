"""Programmatic dependent launch: a kernel is set up while the one before it writes its last results back.

Each kernel calls `wait_for_previous` as its first line, and each launch passes `launch_pdl=launches_early(device)`.
Why, and why nothing is read too early: docs/adr/0009-kernels-are-launched-early.md.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

ENABLED = True  # benchmarks patch it; a kernel that is not launched early does not wait
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def wait_for_previous():
    """Wait until all kernels launched before are complete, their writes visible.

    All programs call it before they read or write memory: of a kernel launched early nothing else keeps it behind the
    one before. The next one is set up when all programs of this one have ended; it waits for this one only, whose own
    programs were behind this wait.
    """
    if not INTERPRETED:  # noqa: SIM102  # two constants; the interpreter has no target
        if cuda_capability_geq(9):
            tl.extra.cuda.gdc_wait()


def launches_early(device: torch.device) -> bool:
    """Whether kernels on `device` are launched before the one ahead of them is complete: from Hopper on."""
    return ENABLED and _can_launch_early(device)


@cache
def _can_launch_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
