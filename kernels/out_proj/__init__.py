"""Low-rank output projection: per head group, then joined."""

from dsv4_kernels.out_proj.reference import grouped_out_proj

__all__ = ["grouped_out_proj"]
