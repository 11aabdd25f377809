"""Time of the products with weights against their floors, on a GPU: `python -m dsv4_kernels.gemm.bench OUT.jsonl`.

Bytes: the weight once, with its scales (1 + 2^-14 bytes a value in FP8, 2 in bfloat16), activations in and out once.
FLOPs: 2 T N K. The floor takes the FP8 or the bfloat16 rate of the library's product of two large matrices.

Beside them: the library in bfloat16 (`torch.mm`), and in FP8 as `library.py` calls it or, where that does not, with one
scale a row, which is a yardstick of speed only. What `quantize_rows` costs is a line of its own, because several
products share it.

Of few rows also what shares a launch with products: the norm behind the latent one, window rows, compressors and the
preparation of queries beside and behind the queries' own. "apart" are the launches that more rows have; their bytes are
those of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dsv4_kernels.benching import Measured, measure, num_copies, relative_error, write_lines
from dsv4_kernels.cases import MODELS, Shapes, released
from dsv4_kernels.compressor import cases as compressor
from dsv4_kernels.gemm import library, pair
from dsv4_kernels.gemm.cases import INDEX_HEADS, LayerRows, Product, products
from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.quantize import quantize_rows
from dsv4_kernels.gemm.reference import linear
from dsv4_kernels.gemm.triton import Tiles, linear_bf16, linear_fp8
from dsv4_kernels.metadata import C4, C128
from dsv4_kernels.quant import dequantize_fp8_blocks

FEW_TOKENS = (1, 2, 4, 8)
TOKENS = (1, 16, 64, 256, 2048, 8192)
HEAD_TOKENS = 256  # the head runs for rows that sample, never for a whole prompt
ERROR_TOKENS = 256  # rows of which the error is computed
# Other tiles, at the number of tokens where they are compared; `tiles_for` has the ones that are used.
OTHER_TOKENS = 2048
OTHERS = {"triton 64 tokens, 4 warps": Tiles(64, 1, 4, 4), "triton 128 tokens, 3 stages": Tiles(128, 1, 8, 3)}


def floor_bytes(product: Product, num_tokens: int) -> int:
    """Bytes that one product must move; FP8 gives bfloat16, bfloat16 gives float32."""
    num_rows, depth = product.num_rows, product.depth
    if product.fp8:
        scales = -(-num_rows // GROUP) * (depth // GROUP) + num_tokens * depth // GROUP
        return num_rows * depth + num_tokens * depth + scales + 2 * num_tokens * num_rows
    return 2 * num_rows * depth + 2 * num_tokens * depth + 4 * num_tokens * num_rows


def flops(product: Product, num_tokens: int) -> int:
    """Floating-point operations of one product."""
    return 2 * num_tokens * product.num_rows * product.depth


def per_row(rows: Fp8Rows, weight: Fp8Weight) -> Callable[[], Tensor]:
    """The library's FP8 product with one scale a row."""
    row_scale, column_scale = (
        torch.ones(count, device=rows.codes.device) for count in (len(rows.codes), len(weight.codes))
    )
    return lambda: torch._scaled_mm(
        rows.codes, weight.codes.t(), row_scale[:, None], column_scale[None, :], out_dtype=torch.bfloat16
    )


def fp8_lines(product: Product, num_tokens: int) -> Iterator[tuple[str, list[Callable[[], Tensor]], dict[str, float]]]:
    """(implementation, calls, errors) of a product with FP8 weights."""
    made = [product.make(num_tokens, seed, "cuda") for seed in range(num_copies(floor_bytes(product, num_tokens)))]
    quantised = [(quantize_rows(x), weight) for x, weight in made]
    (x, weight), (rows, _) = made[0], quantised[0]
    values = dequantize_fp8_blocks(weight.codes, weight.exponents)
    expected = linear(x[:ERROR_TOKENS], values, quantize=True)
    error = relative_error(linear_fp8(rows, weight)[:ERROR_TOKENS], expected)
    yield "triton", [lambda pair=pair: linear_fp8(*pair) for pair in quantised], {"relative_error": error}
    for label, tiles in OTHERS.items() if num_tokens == OTHER_TOKENS else ():
        yield label, [lambda pair=pair, tiles=tiles: linear_fp8(*pair, tiles=tiles) for pair in quantised], {}
    if not library.is_for_library(rows.codes):
        yield "scaled_mm per row", [per_row(*pair) for pair in quantised], {}
    else:
        error = relative_error(library.linear_fp8(rows, weight)[:ERROR_TOKENS], expected)
        yield "library", [lambda pair=pair: library.linear_fp8(*pair) for pair in quantised], {"relative_error": error}


def bf16_lines(product: Product, num_tokens: int) -> Iterator[tuple[str, list[Callable[[], Tensor]], dict[str, float]]]:
    """(implementation, calls, errors) of a product with bfloat16 weights and a float32 result."""
    made = [product.make(num_tokens, seed, "cuda") for seed in range(num_copies(floor_bytes(product, num_tokens)))]
    x, weight = made[0]
    expected = linear(x[:ERROR_TOKENS], weight, out_dtype=torch.float32)
    error = relative_error(linear_bf16(x, weight)[:ERROR_TOKENS], expected)
    yield "triton", [lambda pair=pair: linear_bf16(*pair) for pair in made], {"relative_error": error}
    yield "library", [lambda pair=pair: torch.mm(pair[0], pair[1].t(), out_dtype=torch.float32) for pair in made], {}


def quantise_line(name: str, hidden: int, num_tokens: int, measure: Callable[..., Measured]) -> dict[str, Any]:
    """What one quantisation of the layer input costs: bfloat16 read, codes and scales written."""
    moved = num_tokens * (3 * hidden + hidden // GROUP)
    inputs = [torch.randn(num_tokens, hidden, device="cuda").bfloat16() for _ in range(num_copies(moved))]
    measured = measure([lambda x=x: quantize_rows(x) for x in inputs], moved, 4 * num_tokens * hidden)
    return measured.as_line(op="quantize_rows", implementation="triton", shapes=name, num_tokens=num_tokens)


def shared_lines(shapes: Shapes, measure: Callable[..., Measured]) -> Iterator[dict[str, Any]]:
    """Few rows of Pro: both input products with the norm, and the queries with all that is beside them."""
    by_name = {product.name: product for product in products(shapes)}
    latent, raw = by_name["wq_a+wkv"], by_name["raw"]
    norm = torch.ones(shapes.q_lora_rank, device="cuda")

    def line(op: str, label: str, num_tokens: int, calls: list[Callable[[], object]], *of: Product) -> dict[str, Any]:
        moved, work = (sum(count(each, num_tokens) for each in of) for count in (floor_bytes, flops))
        return measure(calls, moved, work, peak="fp8").as_line(
            op=op, implementation=label, shapes="pro", num_tokens=num_tokens
        )

    for num_tokens in FEW_TOKENS:
        inputs = []
        for seed in range(4):
            (x, weight), (_, matrix) = (each.make(num_tokens, seed, "cuda") for each in (latent, raw))
            inputs.append((quantize_rows(x), weight, x, matrix, norm, 1e-6))
        for label, few in (("with its norm", FEW_TOKENS[-1]), ("triton", 0)):
            with mock.patch.object(pair, "FEW", few):  # graphs are captured inside
                calls = [partial(pair.linear_pair, *each) for each in inputs]
                yield line("gemm wq_a+wkv, raw", label, num_tokens, calls, latent, raw)
        step = compressor.Case("decode", tuple(range(1151, 1151 + num_tokens)), (1,) * num_tokens)
        for ratio, name in ((C4, "wq_b+index"), (C128, "wq_b")):
            _, weight = by_name[name].make(1, 0, "cuda")
            rows = [LayerRows(ratio, step, weight, shapes.num_attention_heads, INDEX_HEADS, n, "cuda") for n in (0, 1)]
            calls = [partial(each.together, each.norm()) for each in rows]
            yield line(f"queries of C{ratio}", "one launch", num_tokens, calls, by_name[name])
            yield line(f"queries of C{ratio}", "apart", num_tokens, [each.apart for each in rows], by_name[name])


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """One line for each implementation, product, model and number of tokens."""
    for name, shapes in released(models):
        if name == "pro":
            yield from shared_lines(shapes, measure)
        for num_tokens in TOKENS:
            yield quantise_line(name, shapes.hidden_size, num_tokens, measure)
            for product in products(shapes):
                if product.name == "head" and num_tokens > HEAD_TOKENS:
                    continue
                moved, work = floor_bytes(product, num_tokens), flops(product, num_tokens)
                runs = fp8_lines(product, num_tokens) if product.fp8 else bf16_lines(product, num_tokens)
                for label, calls, errors in runs:
                    yield measure(calls, moved, work, peak="fp8" if product.fp8 else "bf16").as_line(
                        op=f"gemm {product.name}",
                        implementation=label,
                        shapes=name,
                        num_tokens=num_tokens,
                        **errors,
                    )


if __name__ == "__main__":
    write_lines(lines())
