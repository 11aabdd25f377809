"""Sampling: log probabilities, penalties, bias, bans; temperature, top-k, top-p, min-p, one counter-based random number
per row."""

from dsv4_kernels.sampling.reference import (
    LOWEST,
    NonFiniteLogits,
    add_bias,
    ban,
    penalise,
    sample,
    token_logprobs,
    uniform,
)

__all__ = ["LOWEST", "NonFiniteLogits", "add_bias", "ban", "penalise", "sample", "token_logprobs", "uniform"]
