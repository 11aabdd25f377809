"""Manifold-constrained hyper-connections: collapse before a sublayer, mix after it, final collapse."""

from dsv4_kernels.cpu import preferred
from dsv4_kernels.mhc import cpu, reference
from dsv4_kernels.mhc.reference import sinkhorn

__all__ = ["mhc_head", "mhc_post", "mhc_pre", "sinkhorn"]

mhc_head = preferred(cpu.mhc_head, reference.mhc_head)
mhc_post = preferred(cpu.mhc_post, reference.mhc_post)
mhc_pre = preferred(cpu.mhc_pre, reference.mhc_pre)
