"""Manifold-constrained hyper-connections: collapse before a sublayer, mix after it, final collapse."""

from dsv4_kernels.mhc.reference import mhc_head, mhc_post, mhc_pre, sinkhorn

__all__ = ["mhc_head", "mhc_post", "mhc_pre", "sinkhorn"]
