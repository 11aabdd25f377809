"""What the compile gate launches of `gemm`: the latent projection in FP8, the raw ones in bfloat16, and few queries."""

import torch

from dsv4_kernels.cases import FLASH, PRO
from dsv4_kernels.compressor.cases import CASES as STEPS
from dsv4_kernels.deterministic import deterministic
from dsv4_kernels.gemm import library
from dsv4_kernels.gemm import triton as gemm
from dsv4_kernels.gemm.cases import INDEX_DIM, INDEX_HEADS, LayerRows
from dsv4_kernels.gemm.fp8 import Fp8Weight
from dsv4_kernels.gemm.pair import linear_pair
from dsv4_kernels.gemm.quantize import empty_rows, quantize_rows
from dsv4_kernels.metadata import C4, C128

SIZES = {"pro, 1 token": (PRO, 1), "pro, 64 tokens": (PRO, 64), "flash, 512 tokens": (FLASH, 512)}
SIZES |= {f"pro, {num} tokens, deterministic": (PRO, num) for num in (64, 200)}
RUNS = [f"{kind}, {size}" for size in SIZES for kind in ("fp8", "bf16")]
DRAFTS = {"c4": {}, "c4 with drafts": {"ring_rows": 16}, "c128": {}, "c128 with drafts": {"banks": 4}, "window": {}}
RUNS += ["both, pro, 1 token", "both, pro, 64 tokens", "latent, pro, 1 token", *(f"queries, {size}" for size in DRAFTS)]
KERNELS = {"_quantize", "_product", "_pair", "_queries", "_queries_c4", "_queries_c128", "_widen", "_multiply_out"}


def fp8_weight(num_rows: int, depth: int) -> Fp8Weight:
    """Unwritten memory: a launch only compiles."""
    codes = torch.empty(num_rows, depth, dtype=torch.float8_e4m3fn)
    return Fp8Weight(codes, torch.empty(-(-num_rows // 128), depth // 128, dtype=torch.uint8))


def launch(run: str) -> None:
    """Launch one of RUNS on CPU tensors."""
    with deterministic("deterministic" in run):
        _launch(run)


def _launch(run: str) -> None:
    kind, size = run.split(", ", 1)
    if kind == "queries":
        index_heads, ratio = (INDEX_HEADS, C4) if "c4" in size else (0, C128 if "c128" in size else 0)
        num_heads, num_rows = PRO.num_attention_heads, PRO.num_attention_heads * PRO.head_dim + INDEX_DIM * index_heads
        weight = fp8_weight(num_rows, PRO.q_lora_rank)
        rows = LayerRows(ratio, STEPS[0], weight, num_heads, index_heads or 1, 0, **DRAFTS[size])
        rows.together(empty_rows(STEPS[0].num_rows, PRO.q_lora_rank, "cpu"))
        return
    shapes, num_tokens = SIZES[size]
    x = torch.empty(num_tokens, shapes.hidden_size, dtype=torch.bfloat16)
    weight = fp8_weight(shapes.q_lora_rank + shapes.head_dim, shapes.hidden_size)
    matrix = torch.empty(2624, shapes.hidden_size, dtype=torch.bfloat16)
    if kind in ("both", "latent"):
        given = matrix if kind == "both" else None
        linear_pair(quantize_rows(x), weight, x, given, torch.empty(shapes.q_lora_rank), 1e-6)
    elif kind == "fp8":
        gemm.linear_fp8(quantize_rows(x), weight)
        library.float_scales(quantize_rows(x))
        library.bf16_values(weight)
    else:
        gemm.linear_bf16(x, matrix)


def matrix_instructions(kernel: str, run: str, capability: int) -> set[str]:
    """What the machine code must multiply matrices with; for 103 those of FP8 apply the scales too."""
    fp8, bf16 = {90: ("QGMMA", "HGMMA"), 103: ("UTCQMMA", "UTCHMMA")}[capability]
    if kernel.startswith("_queries"):  # 16 index queries are too few rows for a large product
        return {fp8, "HMMA"} if kernel == "_queries_c4" else {fp8}
    if kernel not in ("_product", "_pair"):
        return set()
    kind = run.split(", ")[0]
    return {"fp8": {fp8}, "bf16": {bf16}, "both": {fp8, bf16}, "latent": {fp8, bf16}}[kind]
