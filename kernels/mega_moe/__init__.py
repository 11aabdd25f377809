"""The experts of one layer as one operation: dispatch, two products with SwiGLU between, combine, shared expert."""

from dsv4_kernels.cpu import preferred
from dsv4_kernels.mega_moe import cpu, reference

__all__ = ["mega_moe"]

mega_moe = preferred(cpu.mega_moe, reference.mega_moe)
