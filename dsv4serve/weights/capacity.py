"""Refuse a model that does not fit before anything is allocated."""

from __future__ import annotations

import math

from dsv4serve.config import ModelConfig
from dsv4serve.obs.memory import available_memory_bytes
from dsv4serve.types import CapacityError
from dsv4serve.weights.layout import value_specs

RUNTIME_BYTES = {"I64": 8}  # everything else becomes float32


def runtime_bytes(config: ModelConfig) -> int:
    """Bytes of the CPU runtime tensors of `config`."""
    # FP4 weights hold two values a byte.
    return sum(
        math.prod(spec.shape) * RUNTIME_BYTES.get(spec.dtype, 4) * (2 if spec.dtype == "I8" else 1)
        for _, spec in value_specs(config)
    )


def require_memory(config: ModelConfig) -> None:
    """Raise CapacityError when the float32 model exceeds the memory that is available now."""
    needed, available = runtime_bytes(config), available_memory_bytes()
    if needed > available:
        raise CapacityError(
            f"the model needs {needed:,} bytes as float32 weights on CPU; {available:,} bytes of memory are available"
        )
