"""RMSNorm over the last dimension."""

from dsv4_kernels.cpu import preferred
from dsv4_kernels.norm import cpu, reference

__all__ = ["head_norm", "rms_norm"]

head_norm = preferred(cpu.head_norm, reference.head_norm)
rms_norm = preferred(cpu.rms_norm, reference.rms_norm)
