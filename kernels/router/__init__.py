"""Expert routing: sqrt-softplus scores, biased top-k, or a token-id table in the hash layers."""

from dsv4_kernels.cpu import preferred
from dsv4_kernels.router import cpu, reference

__all__ = ["route"]

route = preferred(cpu.route, reference.route)
