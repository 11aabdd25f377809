"""How many Triton kernels this process has compiled and loaded from Triton's cache: at start-up, and while it serves.

A request that needs a kernel nobody has made yet waits for the compiler, for seconds, and so do all others. So the
engine runs every form of its kernels before it is ready, and what comes after that is counted here and is a mistake.
Triton calls `KernelCounter.observe`; who has no Triton counts nothing.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import msgspec

logger = logging.getLogger(__name__)

START_UP, SERVING = "start-up", "serving"


class KernelCounts(msgspec.Struct):
    """Kernels that were made, and how long that took; what a process already has in memory is not counted again."""

    compiled: int = 0
    loaded: int = 0  # from the cache on disk
    seconds: float = 0.0


class KernelCounter:
    """The counts by phase, START_UP or SERVING. Of the process, as Triton's own cache is."""

    def __init__(self) -> None:
        self.phases = {START_UP: KernelCounts(), SERVING: KernelCounts()}
        self.ready_s = 0.0  # from the start of the process until it was ready; 0 = it is not
        self._phase = START_UP

    def start_up(self) -> None:
        """What is made from now on belongs to a start."""
        self._phase, self.ready_s = START_UP, 0.0

    def serve(self) -> None:
        """From now on nothing should be made."""
        self._phase, self.ready_s = SERVING, process_age_s()

    @property
    def num_late(self) -> int:
        """Kernels that were compiled or loaded while the process served."""
        return self.phases[SERVING].compiled + self.phases[SERVING].loaded

    def observe(self, *, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        """Count one kernel: what `triton.knobs.compilation.listener` is called with, `times` being microseconds."""
        counts = self.phases[self._phase]
        counts.compiled += not cache_hit
        counts.loaded += cache_hit
        counts.seconds += times.total / 1e6
        if self._phase == SERVING:
            logger.warning(
                "the kernel %s was %s in %.2f s while requests waited; start-up should have run it. Arguments %s, "
                "constants %s",
                src.name, "loaded" if cache_hit else "compiled", times.total / 1e6, src.signature, src.constants,
            )  # fmt: skip


kernels = KernelCounter()


def process_age_s() -> float:
    """Seconds since this process was started."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()  # behind the name, which may hold anything
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
