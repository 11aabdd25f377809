"""RMSNorm over the last dimension."""

from dsv4_kernels.norm.reference import rms_norm

__all__ = ["rms_norm"]
