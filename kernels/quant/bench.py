"""Time of quantising activations against its floor, on a GPU: `python -m dsv4_kernels.quant.bench OUT.jsonl`.

Bytes: x in bfloat16 read; codes (1 byte a value in FP8, half a byte in FP4) and a scale byte a group written, or the
rounded values in bfloat16. FLOPs: 4 a value. Memory decides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.benching import Measured, measure, num_copies, relative_error, write_lines
from dsv4_kernels.cases import MODELS, released
from dsv4_kernels.quant import reference, triton

TOKENS = (1, 16, 64, 256, 2048, 8192)
# Name: group, and bytes written for each value.
OPERATIONS = {
    "quantize_fp8": (128, 1 + 1 / 128),
    "quantize_fp4": (32, 1 / 2 + 1 / 32),
    "fake_quantize_fp8": (128, 2),
    "fake_quantize_fp4": (32, 2),
}


def moved_bytes(op: str, num_values: int) -> int:
    """Bytes that quantising so many values must move."""
    return round(num_values * (2 + OPERATIONS[op][1]))


def values(op: str, result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """What a result stands for, float32."""
    if isinstance(result, Tensor):
        return result.float()
    dequantize = reference.dequantize_fp8 if op == "quantize_fp8" else reference.dequantize_fp4
    return dequantize(*result, OPERATIONS[op][0])


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """One line for each operation on the input of the experts, each model and number of tokens."""
    for name, shapes in released(models):
        for num_tokens in TOKENS:
            for op, (group, _) in OPERATIONS.items():
                moved = moved_bytes(op, num_tokens * shapes.hidden_size)
                inputs = [
                    torch.randn(num_tokens, shapes.hidden_size, device="cuda").bfloat16()
                    for _ in range(num_copies(moved))
                ]
                run = getattr(triton, op)
                expected = values(op, getattr(reference, op)(inputs[0], group))
                error = relative_error(values(op, run(inputs[0], group)), expected)
                calls = [lambda x=x, run=run, group=group: run(x, group) for x in inputs]
                yield measure(calls, moved, 4 * num_tokens * shapes.hidden_size).as_line(
                    op=op, implementation="triton", shapes=name, num_tokens=num_tokens, relative_error=error
                )


if __name__ == "__main__":
    write_lines(lines())
