"""Matrix products with weights: float32 accumulation, optional E4M3 activations."""

from dsv4_kernels.gemm.reference import linear

__all__ = ["linear"]
