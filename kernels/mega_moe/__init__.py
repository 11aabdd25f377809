"""The experts of one layer as one operation: dispatch, two products with SwiGLU between, combine, shared expert."""

from dsv4_kernels.mega_moe.reference import mega_moe

__all__ = ["mega_moe"]
