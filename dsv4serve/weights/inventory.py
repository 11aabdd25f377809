"""Every tensor of an official DeepSeek-V4 checkpoint, computed from config.json alone. Torch-free.

The list reproduces the published index totals byte for byte: Pro 145,116 tensors and 864,704,792,696 bytes,
Flash 69,187 tensors and 159,609,485,896 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from dsv4serve.config import ModelConfig
from dsv4serve.types import CheckpointError

# Bytes per element of the safetensors dtypes. Official checkpoints use the first six; the others are known
# so that a file which holds them is read correctly before it is refused.
DTYPE_BYTES = {
    "BF16": 2,
    "F32": 4,
    "I64": 8,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "F16": 2,
    "F64": 8,
    "I32": 4,
    "I16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E5M2": 1,
}

FP8_BLOCK = 128  # rows and columns that share one E8M0 scale in an FP8 matrix
FP4_GROUP = 32  # consecutive columns of a row that share one E8M0 scale in an FP4 matrix


class TensorSpec(NamedTuple):
    """How one tensor is stored: safetensors dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def inventory(config: ModelConfig) -> dict[str, TensorSpec]:
    """Official name -> dtype and shape of every tensor, in the order of the released shards.

    Raises CheckpointError when a quantised matrix would not divide into its scale blocks.
    """
    vocab, hidden = config.vocab_size, config.hidden_size
    tensors = {"embed.weight": TensorSpec("BF16", (vocab, hidden))}
    for layer, ratio in enumerate(config.layer_ratios):
        prefix = f"layers.{layer}."
        tensors.update(_block(config, prefix, ratio, hashed=layer < config.num_hash_layers))
    tensors["norm.weight"] = TensorSpec("BF16", (hidden,))
    tensors["head.weight"] = TensorSpec("BF16", (vocab, hidden))
    tensors.update(_hyper_connection(config, "hc_head_", num_mixes=config.hc_mult, num_scales=1))
    for mtp in range(config.num_nextn_predict_layers):
        prefix = f"mtp.{mtp}."
        tensors.update(_block(config, prefix, ratio=0, hashed=False))
        tensors.update(_dense(config, f"{prefix}e_proj", hidden, hidden))
        tensors.update(_dense(config, f"{prefix}h_proj", hidden, hidden))
        for name in ("enorm", "hnorm", "norm"):
            tensors[f"{prefix}{name}.weight"] = TensorSpec("BF16", (hidden,))
        tensors.update(_hyper_connection(config, f"{prefix}hc_head_", num_mixes=config.hc_mult, num_scales=1))
    return tensors


_Named = Iterator[tuple[str, TensorSpec]]


def _block(config: ModelConfig, prefix: str, ratio: int, hashed: bool) -> _Named:
    hidden = config.hidden_size
    yield from _attention(config, f"{prefix}attn.", ratio)
    yield from _ffn(config, f"{prefix}ffn.", hashed)
    num_mixes = (2 + config.hc_mult) * config.hc_mult  # pre, post, and the hc_mult x hc_mult combination
    for sublayer in ("attn", "ffn"):
        yield f"{prefix}{sublayer}_norm.weight", TensorSpec("BF16", (hidden,))
        yield from _hyper_connection(config, f"{prefix}hc_{sublayer}_", num_mixes, num_scales=3)


def _attention(config: ModelConfig, prefix: str, ratio: int) -> _Named:
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    rank = config.o_groups * config.o_lora_rank
    yield from _dense(config, f"{prefix}wq_a", config.q_lora_rank, hidden)
    yield from _dense(config, f"{prefix}wq_b", heads * head_dim, config.q_lora_rank)
    yield from _dense(config, f"{prefix}wkv", head_dim, hidden)
    yield from _dense(config, f"{prefix}wo_a", rank, heads * head_dim // config.o_groups)
    yield from _dense(config, f"{prefix}wo_b", hidden, rank)
    yield f"{prefix}q_norm.weight", TensorSpec("BF16", (config.q_lora_rank,))
    yield f"{prefix}kv_norm.weight", TensorSpec("BF16", (head_dim,))
    yield f"{prefix}attn_sink", TensorSpec("F32", (heads,))
    if ratio:
        yield from _compressor(hidden, f"{prefix}compressor.", ratio, head_dim)
    if ratio == 4:
        indexer, index_dim = f"{prefix}indexer.", config.index_head_dim
        yield from _dense(config, f"{indexer}wq_b", config.index_n_heads * index_dim, config.q_lora_rank)
        yield f"{indexer}weights_proj.weight", TensorSpec("BF16", (config.index_n_heads, hidden))
        yield from _compressor(hidden, f"{indexer}compressor.", ratio, index_dim)


def _compressor(hidden: int, prefix: str, ratio: int, dim: int) -> _Named:
    width = 2 * dim if ratio == 4 else dim  # C4 has an early and a current half
    yield f"{prefix}wkv.weight", TensorSpec("BF16", (width, hidden))
    yield f"{prefix}wgate.weight", TensorSpec("BF16", (width, hidden))
    yield f"{prefix}ape", TensorSpec("F32", (ratio, width))
    yield f"{prefix}norm.weight", TensorSpec("BF16", (dim,))


def _ffn(config: ModelConfig, prefix: str, hashed: bool) -> _Named:
    hidden, experts, inner = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    yield f"{prefix}gate.weight", TensorSpec("BF16", (experts, hidden))
    if hashed:
        yield f"{prefix}gate.tid2eid", TensorSpec("I64", (config.vocab_size, config.num_experts_per_tok))
    else:
        yield f"{prefix}gate.bias", TensorSpec("F32", (experts,))
    matrices = (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden))
    for name, rows, columns in matrices:
        yield from _dense(config, f"{prefix}shared_experts.{name}", rows, columns)
    for expert in range(experts):
        for name, rows, columns in matrices:
            yield from _expert(config, f"{prefix}experts.{expert}.{name}", rows, columns)


def _hyper_connection(config: ModelConfig, prefix: str, num_mixes: int, num_scales: int) -> _Named:
    yield f"{prefix}fn", TensorSpec("F32", (num_mixes, config.hc_mult * config.hidden_size))
    yield f"{prefix}base", TensorSpec("F32", (num_mixes,))
    yield f"{prefix}scale", TensorSpec("F32", (num_scales,))


def _dense(config: ModelConfig, name: str, rows: int, columns: int) -> _Named:
    """FP8 with one scale per 128x128 block, or BF16."""
    if not config.is_quantized:
        yield f"{name}.weight", TensorSpec("BF16", (rows, columns))
        return
    if rows % FP8_BLOCK or columns % FP8_BLOCK:
        raise CheckpointError(
            f"config.json: {name}.weight would be [{rows}, {columns}]; "
            f"an FP8 matrix needs multiples of {FP8_BLOCK} (quantization_config.weight_block_size)"
        )
    yield f"{name}.weight", TensorSpec("F8_E4M3", (rows, columns))
    yield f"{name}.scale", TensorSpec("F8_E8M0", (rows // FP8_BLOCK, columns // FP8_BLOCK))


def _expert(config: ModelConfig, name: str, rows: int, columns: int) -> _Named:
    """FP4, two codes a byte along the columns and one scale per 32 of them, or BF16."""
    if config.expert_dtype is None:
        yield f"{name}.weight", TensorSpec("BF16", (rows, columns))
        return
    if columns % FP4_GROUP:
        raise CheckpointError(
            f"config.json: {name}.weight would be [{rows}, {columns}]; "
            f"an FP4 matrix needs columns in multiples of {FP4_GROUP} (expert_dtype 'fp4')"
        )
    yield f"{name}.weight", TensorSpec("I8", (rows, columns // 2))
    yield f"{name}.scale", TensorSpec("F8_E8M0", (rows, columns // FP4_GROUP))
