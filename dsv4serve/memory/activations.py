"""What a step of the device engine needs beside weights and cache: activations of one layer, scores and logits."""

from __future__ import annotations

from dsv4serve.config import ModelConfig

SCORE_BYTES = 512 << 20  # index scores and lists of the best, which are bounded (kernels/indexer/triton.py)
BF16, F32 = 2, 4


def row_bytes(config: ModelConfig) -> int:
    """Most bytes of one row between two layers and within one: layers follow one another in the same memory.

    All that the larger sublayer holds at its fullest, counted as if nothing of it were freed on the way.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    index = config.index_n_heads * config.index_head_dim
    experts = config.num_experts_per_tok + config.n_shared_experts
    # Streams before and after a boundary; x in BF16, in E4M3 and as the experts read it; parts of a sublayer's output.
    around = 2 * config.hc_mult * hidden * BF16 + hidden * (2 * BF16 + 1) + experts * hidden * BF16
    raw = 4 * config.head_dim + 4 * config.index_head_dim + config.index_n_heads
    attention = (config.q_lora_rank + config.head_dim) * BF16 + config.q_lora_rank + raw * F32
    attention += (2 * heads + 2 * index) * BF16 + config.index_topk * F32  # queries, also as prepared; the output
    attention += config.o_groups * config.o_lora_rank * (BF16 + 1) + hidden * BF16
    width = config.moe_intermediate_size
    moe = experts * width * BF16 + 3 * width * BF16 + config.n_routed_experts * F32
    return around + max(attention, moe)


def step_bytes(config: ModelConfig, num_rows: int, num_requests: int, num_draft_tokens: int) -> int:
    """Of a step with so many rows and requests, each with so many drafts.

    Logits behind each token and of each draft twice: they are copied to where a graph leaves them, and when the product
    is gone, sampling needs as much. And wo_a in bfloat16 (kernels/out_proj/triton.py).
    """
    logits = 2 * num_requests * (1 + 2 * num_draft_tokens) * config.vocab_size * F32
    wo_a = config.num_attention_heads * config.head_dim * config.o_lora_rank * BF16
    return num_rows * row_bytes(config) + logits + wo_a + (SCORE_BYTES if 4 in config.compress_ratios else 0)
