"""Expert routing: sqrt-softplus scores, biased top-k, or a token-id table in the hash layers."""

from dsv4_kernels.router.reference import route

__all__ = ["route"]
