"""Values of a verified checkpoint by official name: memory-mapped, dequantised, and checked while they are read."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor

from dsv4_kernels.quant import dequantize_fp4_weight, dequantize_fp8_blocks
from dsv4serve.config import ModelConfig
from dsv4serve.types import CheckpointError
from dsv4serve.weights.index import CheckpointIndex

NAN_SCALE = 255  # the E8M0 byte that is not a number


class CheckpointReader:
    """Reads one tensor at a time. A context manager: the shards stay mapped inside it."""

    def __init__(self, index: CheckpointIndex, config: ModelConfig) -> None:
        self._index = index
        self._num_experts = config.n_routed_experts
        self._shards: dict[str, safe_open] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """Values of `name` (not a scale): float of the stored width or float32 where quantised, int64 for tid2eid.

        Raises CheckpointError for a NaN scale, a value that is not finite, or an expert id outside the model.
        """
        values, scale = self.read_stored(name)
        if scale is None:
            return values
        fp4 = values.dtype is torch.int8
        values = dequantize_fp4_weight(values, scale) if fp4 else dequantize_fp8_blocks(values, scale)
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{self._where(name)} has values that are not finite")
        return values

    def read_stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """`name` as it is stored, and its E8M0 scales as bytes if it is quantised. Raises as `read`."""
        values = self._stored(name)
        if name.endswith(".tid2eid"):
            self._check_expert_ids(name, values)
            return values, None
        scale_name = name.removesuffix("weight") + "scale"
        scale = None
        if name.endswith(".weight") and scale_name in self._index.specs:
            scale = self._stored(scale_name).view(torch.uint8)
            if bool((scale == NAN_SCALE).any()):
                raise CheckpointError(f"{self._where(scale_name)} has a NaN scale (E8M0 byte 255)")
        is_finite = True  # of FP4 every code is
        if values.dtype is torch.float8_e4m3fn:
            is_finite = not bool((values.view(torch.uint8) & 0x7F == 0x7F).any())
        elif values.is_floating_point():
            is_finite = bool(torch.isfinite(values).all())
        if not is_finite:
            raise CheckpointError(f"{self._where(name)} has values that are not finite")
        return values, scale

    def stored_bytes(self, name: str) -> int:
        """Bytes that `read(name)` takes from disk."""
        specs = self._index.specs
        scale_name = name.removesuffix("weight") + "scale"
        with_scale = name.endswith(".weight") and scale_name in specs
        return specs[name].num_bytes + (specs[scale_name].num_bytes if with_scale else 0)

    def _stored(self, name: str) -> Tensor:
        file = self._index.files[name]
        if file not in self._shards:
            self._shards[file] = self._stack.enter_context(safe_open(self._index.directory / file, framework="pt"))
        return self._shards[file].get_tensor(name)

    def _check_expert_ids(self, name: str, ids: Tensor) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._num_experts:
            raise CheckpointError(
                f"{self._where(name)} has expert ids {low}..{high}; "
                f"expected 0..{self._num_experts - 1} (n_routed_experts)"
            )

    def _where(self, name: str) -> str:
        return f"{self._index.directory / self._index.files[name]}: tensor {name!r}"
