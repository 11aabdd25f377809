"""Low-rank output projection: per head group, then joined."""

from dsv4_kernels.cpu import preferred
from dsv4_kernels.out_proj import cpu, reference

__all__ = ["grouped_out_proj"]

grouped_out_proj = preferred(cpu.grouped_out_proj, reference.grouped_out_proj)
