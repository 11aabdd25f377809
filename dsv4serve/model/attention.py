"""Attention of one layer (docs/model.md sections 4 to 6): projections, keys through the step context, output."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from dsv4_kernels.gemm import linear
from dsv4_kernels.norm import head_norm, rms_norm
from dsv4_kernels.out_proj import grouped_out_proj
from dsv4_kernels.quant import fake_quantize_fp4, hadamard
from dsv4_kernels.rope import apply_rope, rope_frequencies
from dsv4serve.config import ModelConfig
from dsv4serve.model.compressor import Compressor
from dsv4serve.model.context import AttentionInputs, StepContext


@lru_cache(maxsize=16)
def rope_table_frequencies(config: ModelConfig, compressed: bool, device: torch.device) -> Tensor:
    """RoPE frequencies of a layer kind, float64 on `device`: plain for ratio 0, YaRN on the compress theta for others.

    One tensor per kind, so that a step can share its rotations between layers.
    """
    if not compressed:
        return rope_frequencies(config.qk_rope_head_dim, config.rope_theta, None).to(device)
    scaling = config.rope_scaling
    yarn = (scaling.factor, scaling.original_max_position_embeddings, scaling.beta_fast, scaling.beta_slow)
    return rope_frequencies(config.qk_rope_head_dim, config.compress_rope_theta, yarn).to(device)


class Attention:
    """Parameters and projections of one attention layer.

    Args:
        params: float32 tensors by official name.
        prefix: "layers.N." or "mtp.0.".
        index: layer number in the cache; the MTP block is num_hidden_layers.
        quantize: apply the official quantisation points.
    """

    def __init__(
        self, config: ModelConfig, params: Mapping[str, Tensor], prefix: str, index: int, quantize: bool
    ) -> None:
        self.config, self.index, self.quantize = config, index, quantize
        self.ratio = config.compress_ratios[index]
        attn = prefix + "attn."
        self.names = {part: attn + part for part in ("q", "kv", "attend", "output")}  # of observed values
        self.q_norm = params[attn + "q_norm.weight"]
        self.kv_norm = params[attn + "kv_norm.weight"]
        self.sink = params[attn + "attn_sink"]
        self.frequencies = rope_table_frequencies(config, self.ratio > 0, self.sink.device)
        self.wo_a = params[attn + "wo_a.weight"].mT.contiguous().mT  # column by column, as the loader stores the others
        self.wo_b = params[attn + "wo_b.weight"]
        # One product over the layer input for everything that takes it quantised, one for what takes it as it is.
        self.w_latent = _stack([params[attn + "wq_a.weight"], params[attn + "wkv.weight"]])
        w_query = [params[attn + "wq_b.weight"]]
        w_raw: list[Tensor] = []
        self.compressor = self.index_compressor = None
        if self.ratio:
            self.compressor = Compressor(params, attn + "compressor.", self.ratio, config.rms_norm_eps)
            w_raw += self.compressor.projections
        if self.ratio == 4:
            indexer = attn + "indexer."
            self.index_compressor = Compressor(params, indexer + "compressor.", self.ratio, config.rms_norm_eps)
            w_query.append(params[indexer + "wq_b.weight"])
            w_raw += [*self.index_compressor.projections, params[indexer + "weights_proj.weight"]]
        self.w_query = _stack(w_query)
        self.w_raw = _stack(w_raw) if w_raw else None
        self.index_weight_scale = (config.index_head_dim * config.index_n_heads) ** -0.5

    def __call__(self, x: Tensor, step: StepContext) -> Tensor:
        """x [rows, hidden] normed input -> [rows, hidden] in x.dtype."""
        inputs = self.project(x, step)
        step.observe(self.names["q"], inputs.q)
        step.observe(self.names["kv"], inputs.kv)
        output = step.attend(self, inputs)
        step.observe(self.names["attend"], output)
        output = grouped_out_proj(output, self.wo_a, self.wo_b, quantize=self.quantize)
        step.observe(self.names["output"], output)
        return output

    def latents(self, x: Tensor, step: StepContext) -> tuple[Tensor, Tensor]:
        """x [rows, hidden] normed input -> query latents [rows, q_lora_rank], keys [rows, head_dim]; both normed, the
        keys with RoPE."""
        config, eps = self.config, self.config.rms_norm_eps
        latent = linear(x, self.w_latent, quantize=self.quantize)
        q_latent, kv = latent.split([config.q_lora_rank, config.head_dim], dim=-1)
        kv = apply_rope(rms_norm(kv, self.kv_norm, eps), step.rope(self.frequencies))
        return rms_norm(q_latent, self.q_norm, eps), kv

    def project(self, x: Tensor, step: StepContext) -> AttentionInputs:
        """All projections of the layer input, RoPE applied at the rows' positions."""
        config, eps = self.config, self.config.rms_norm_eps
        rotations = step.rope(self.frequencies)
        q_latent, kv = self.latents(x, step)
        q_dim = config.num_attention_heads * config.head_dim
        must_select = self.index_compressor is not None and step.must_select(config.index_topk)
        queries = linear(q_latent, self.w_query if must_select else self.w_query[:q_dim], quantize=self.quantize)
        q = queries[:, :q_dim].unflatten(-1, (config.num_attention_heads, config.head_dim))
        q = apply_rope(head_norm(q, eps), rotations)
        if self.compressor is None or self.w_raw is None:
            return AttentionInputs(q, kv)
        raw = linear(x, self.w_raw, out_dtype=torch.float32)
        width = 2 * self.compressor.width
        compress = self.compressor.add_ape(raw[:, :width], step.positions)
        if self.index_compressor is None:
            return AttentionInputs(q, kv, compress)
        index_width = 2 * self.index_compressor.width
        index_compress = self.index_compressor.add_ape(raw[:, width : width + index_width], step.positions)
        if not must_select:
            return AttentionInputs(q, kv, compress, index_compress=index_compress)
        return AttentionInputs(
            q,
            kv,
            compress,
            index_q=self._index_q(queries[:, q_dim:], rotations),
            index_weights=raw[:, width + index_width :].to(x.dtype) * self.index_weight_scale,
            index_compress=index_compress,
        )

    def _index_q(self, queries: Tensor, rotations: Tensor) -> Tensor:
        q = queries.unflatten(-1, (self.config.index_n_heads, self.config.index_head_dim))
        return self.rotate_index(apply_rope(q, rotations))

    def rotate_index(self, vectors: Tensor) -> Tensor:
        """Hadamard and FP4 rounding of indexer queries and keys; without rounding the rotation cancels: left out."""
        if not self.quantize:
            return vectors
        return fake_quantize_fp4(hadamard(vectors).to(vectors.dtype))


def _stack(matrices: list[Tensor]) -> Tensor:
    """Rows of all matrices as one, stored column by column as the loader stores them."""
    return torch.cat([matrix.t() for matrix in matrices], dim=1).t()
