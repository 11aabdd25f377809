"""Programmatic dependent launch: a kernel is set up on its multiprocessors while the one before it still runs.

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
    """Wait until all kernels launched before are complete, their writes visible; then let the next one be set up.

    All programs call it before they read or write memory. Of a kernel launched early nothing else keeps it behind the
    one before, and the next one, which may begin right after, relies on this one's programs being behind the wait:
    so what is complete here is complete there, and the next one itself waits for this one only.
    """
    if not INTERPRETED:  # noqa: SIM102  # two constants; the interpreter has no target
        if cuda_capability_geq(9):
            tl.extra.cuda.gdc_wait()
            # The next kernel reads nothing of this one before its own wait, so there is no reason to hold it back.
            tl.extra.cuda.gdc_launch_dependents()


def launches_early(device: torch.device) -> bool:
    """Whether kernels on `device` are launched before the one ahead of them is complete: from Hopper on."""
    return ENABLED and _can_launch_early(device)


@cache
def _can_launch_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
