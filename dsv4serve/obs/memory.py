"""What the machine has left."""

from __future__ import annotations


def available_memory_bytes() -> int:
    """Bytes the kernel says can be allocated without swapping."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable line")
