"""Quantisation-aware training: weights as the released formats would store them, with the gradient of the identity."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from dsv4_kernels.quant import (
    dequantize_fp8_blocks,
    fake_quantize_fp4,
    quantize_fp8_blocks,
)
from dsv4serve.config import ModelConfig
from dsv4serve.weights.layout import official_view, value_specs


def stored_dtypes(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Runtime tensor name -> safetensors dtype of the official tensors it is made of."""
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in weights.items()}
    return {
        owners[official_view(weights, name).untyped_storage().data_ptr()]: spec.dtype
        for name, spec in value_specs(config)
    }


def _fp8(weight: Tensor) -> Tensor:
    flat = weight.flatten(0, -2)
    return dequantize_fp8_blocks(*quantize_fp8_blocks(flat)).view_as(weight)


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "BF16": lambda weight: weight.bfloat16().float(),
    "F8_E4M3": _fp8,
    "I8": fake_quantize_fp4,
}


def rounded(weights: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights with the values that a quantised checkpoint would hold; gradients pass to `weights` unchanged."""
    result = {}
    for name, weight in weights.items():
        rounding = _ROUNDINGS.get(dtypes[name])
        result[name] = weight if rounding is None else weight + (rounding(weight.detach()) - weight.detach())
    return result
