"""Sampling: log probabilities, penalties, bias, bans; temperature, top-k, top-p, min-p, one counter-based random number
per row."""

from dsv4_kernels.sampling.reference import (
    COIN,
    DRAFT,
    LOWEST,
    NonFiniteLogits,
    add_bias,
    ban,
    distribution,
    draw,
    penalise,
    sample,
    signed,
    token_logprobs,
    uniform,
    uniforms,
)

__all__ = [
    "COIN",
    "DRAFT",
    "LOWEST",
    "NonFiniteLogits",
    "add_bias",
    "ban",
    "distribution",
    "draw",
    "penalise",
    "sample",
    "signed",
    "token_logprobs",
    "uniform",
    "uniforms",
]
