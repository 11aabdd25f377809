"""FP8 and FP4 quantisation with power-of-two scales (docs/model.md section 9), and the Hadamard rotation.

Activations: E4M3 with one E8M0 scale per group along the last dim; E2M1 per 32. Weights: E4M3 per 128x128 block,
E2M1 per 32 of a row. All accept zero rows; the last dim must be a multiple of the group (ValueError otherwise).
"""

from dsv4_kernels.quant.reference import (
    dequantize_fp4,
    dequantize_fp4_weight,
    dequantize_fp8,
    dequantize_fp8_blocks,
    fake_quantize_fp4,
    fake_quantize_fp8,
    hadamard,
    quantize_fp4,
    quantize_fp4_weight,
    quantize_fp8,
    quantize_fp8_blocks,
)

__all__ = [
    "dequantize_fp4",
    "dequantize_fp4_weight",
    "dequantize_fp8",
    "dequantize_fp8_blocks",
    "fake_quantize_fp4",
    "fake_quantize_fp8",
    "hadamard",
    "quantize_fp4",
    "quantize_fp4_weight",
    "quantize_fp8",
    "quantize_fp8_blocks",
]
