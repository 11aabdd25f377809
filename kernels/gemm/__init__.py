"""Matrix products with weights: float32 accumulation, optional E4M3 activations."""

from dsv4_kernels.cpu import preferred
from dsv4_kernels.gemm import cpu, reference

__all__ = ["linear"]

linear = preferred(cpu.linear, reference.linear)
