"""Sampling: temperature, top-k, top-p, min-p, one counter-based random number per row."""

from dsv4_kernels.sampling.reference import NonFiniteLogits, sample, uniform

__all__ = ["NonFiniteLogits", "sample", "uniform"]
