"""The last of several programs to arrive goes on alone: what would be a second launch becomes the end of the first.

Programs that share a result (splits of a sum along K, slices of a row) store their parts and count themselves. The last
one sees that all have arrived and reads the parts in a fixed order: which program is last does not change the bits.
Where two things are left to do then, a program that has waited for the last one does the other.
Why: docs/adr/0007-the-last-program-finishes.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_COUNTERS = 65536

_counters: dict[tuple[torch.device, bool], Tensor] = {}
_is_beside = False


def counters(device: torch.device, num: int) -> Tensor:
    """At least `num` int32 zeros on `device`, the same memory at each call.

    Kernels leave them zero and run one after the other on one stream, so all of them share these; those that run beside
    others have their own (`own_counters`). The first call allocates; make it before a CUDA graph is captured. Raises
    ValueError above NUM_COUNTERS.
    """
    if num > NUM_COUNTERS:
        raise ValueError(f"counters: {num} wanted; at most {NUM_COUNTERS} results may be shared between programs")
    key = device, _is_beside
    if key not in _counters:
        _counters[key] = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
    return _counters[key]


@contextmanager
def own_counters() -> Iterator[None]:
    """What is launched inside counts apart, because it runs beside other kernels."""
    global _is_beside
    _is_beside = True
    try:
        yield
    finally:
        _is_beside = False


@triton.jit
def is_last(counter, total):
    """Count this program at `counter`; whether it is the last of `total`, which may read what the others stored.

    All threads of the program call it, after their stores. The counter is zero again behind the last.
    """
    tl.debug_barrier()  # one thread counts for all: the stores of the others come first
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def announce(flag):
    """Let a program go on that waits at `flag`: what this one has read or stored is there for it."""
    tl.atomic_xchg(flag, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(flag):
    """Wait until another program announces itself at `flag`, int32, zero before and afterwards.

    It keeps its place on a multiprocessor. So few programs of a launch may wait, fewer than there is room for, and none
    that others wait for (docs/adr/0015).
    """
    while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") == 0:
        pass
    tl.store(flag, 0)
