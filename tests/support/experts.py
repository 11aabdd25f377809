"""Inputs of `mega_moe` and of its reference, of small sizes."""

import torch

from dsv4_kernels.cases import DEMO
from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.mega_moe.cases import Case
from dsv4_kernels.mega_moe.weights import relayout
from dsv4_kernels.quant.reference import (
    dequantize_fp4_weight,
    dequantize_fp8_blocks,
    quantize_fp4_weight,
    quantize_fp8_blocks,
)


def make(num_tokens, shapes=DEMO, activations="fp8", form="fp8"):
    """Inputs of the kernel and of the reference, the same FP4 and FP8 weights in both."""
    case = Case("random", num_tokens, shapes).make(9, torch.bfloat16)
    inputs = {key: case[key] for key in ("x", "expert_ids", "weights", "limit")} | {"activations": activations}
    given = inputs | {"quantize_shared": True}
    for name in ("w13", "w2"):
        packed, scale = quantize_fp4_weight(case[name])
        given[name] = dequantize_fp4_weight(packed, scale)
        inputs[name] = relayout(packed, scale, form=form)
        name = f"shared_{name}"
        codes, scale = quantize_fp8_blocks(case[name])
        given[name] = dequantize_fp8_blocks(codes, scale)
        inputs[name] = Fp8Weight.from_checkpoint(codes, scale)
    return inputs, given
