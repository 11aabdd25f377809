"""The network on a GPU: formulas of `transformer`, `block`, `attention`, `moe` and `mtp`, in the order of the kernels.

Two things make this a file of its own (docs/adr/0005): the end of one sublayer and the start of the next are one
operation here, so streams travel with an output that is still to be added; and what several products take is
quantised once, with the norm before it. Numerics are `official`. No value is read by the host, so that a CUDA graph can
hold all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4_kernels.gemm.fp8 import GROUP, Fp8Rows, Fp8Weight
from dsv4_kernels.gemm.library import linear_bf16, linear_fp8, linear_pair
from dsv4_kernels.mega_moe.tiles import empty_tiles
from dsv4_kernels.mega_moe.triton import choose_tile, expert_parts
from dsv4_kernels.mega_moe.weights import Fp4Weight
from dsv4_kernels.mhc.triton import mhc_boundary, mhc_head
from dsv4_kernels.norm.embed import embed_and_norm_fp8
from dsv4_kernels.out_proj.triton import grouped_out_proj
from dsv4_kernels.router.triton import route
from dsv4serve.config import ModelConfig
from dsv4serve.model.attention import rope_table_frequencies
from dsv4serve.model.block import HyperConnection
from dsv4serve.model.mtp import PREFIX

# A mapping from names of weights/device.py to tensors, Fp8Weight and Fp4Weight.
Weights = Mapping[str, Any]


@dataclass(frozen=True)
class Streams:
    """Rows between two sublayers: streams, and what the last sublayer has still to add to them (None before any)."""

    streams: Tensor  # bf16 [rows, c, hidden]
    output: Tensor | None = None  # bf16 [rows, hidden], or its parts [rows, parts, hidden]
    post: Tensor | None = None  # f32 [rows, c]
    comb: Tensor | None = None  # f32 [rows, c, c]

    def __getitem__(self, rows: slice | Tensor) -> Streams:
        """Some of the rows."""
        values = (getattr(self, field.name) for field in fields(self))
        return Streams(*(value if value is None else value[rows] for value in values))


class DeviceStep(Protocol):
    """The step as seen by the network; `runner.device_step.PagedDeviceStep` is the one there is."""

    @property
    def positions(self) -> Tensor:
        """int32 [rows], position of each row in its sequence; -1 = padding, of which nothing is read or written."""

    def prepare(self, layer: DeviceAttention, latent: Tensor, raw: Tensor | None) -> Fp8Rows:
        """Store the rows' keys, compress, and give what `layer.w_query` takes: the query latents after their norm.

        Args:
            latent: bf16 [rows, q_lora_rank + head_dim], what `layer.w_latent` gives: query latents and keys.
            raw: f32 [rows, ..], what `layer.w_raw` gives; None where the layer has none.
        """

    def attend(self, layer: DeviceAttention, queries: Tensor, raw: Tensor | None) -> Tensor:
        """Select and attend, behind `prepare`: bf16 [rows, heads, head_dim], inverse RoPE applied.

        Args:
            queries: bf16 [rows, heads * head_dim + index_heads * index_dim], before norm and RoPE; changed in place.
            raw: as in `prepare`.
        """

    def attend_few(self, layer: DeviceAttention, latent: Tensor, raw: Tensor | None, normed: Fp8Rows) -> Tensor:
        """`prepare`, the product with `layer.w_query` and `attend` of few rows.

        Args:
            latent, raw: as in `prepare`.
            normed: what `prepare` gives.
        """

    def keep(self, layer: DeviceAttention, kv: Tensor) -> None:
        """Store the rows' keys, bf16 [rows, head_dim] before norm and RoPE, and nothing else."""


class DeviceAttention:
    """Products of one attention layer. `prefix` is "layers.N." or "mtp.0."."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, index: int, frequencies: Tensor) -> None:
        self.config, self.index, self.frequencies = config, index, frequencies
        self.ratio = config.compress_ratios[index]
        attn = prefix + "attn."
        self.w_latent: Fp8Weight = weights[attn + "latent"]
        rank = config.q_lora_rank
        self.w_kv = Fp8Weight(self.w_latent.codes[rank:], self.w_latent.exponents[rank // GROUP :])  # no copy
        self.w_query: Fp8Weight = weights[attn + "query"]
        self.w_raw: Tensor | None = weights.get(attn + "raw")
        self.wo_a: Fp8Weight = weights[attn + "wo_a.weight"]
        self.wo_b: Fp8Weight = weights[attn + "wo_b.weight"]
        self.q_norm, self.kv_norm = weights[attn + "q_norm.weight"], weights[attn + "kv_norm.weight"]
        self.sink = weights[attn + "attn_sink"]
        self.compressor, self.index_compressor = (
            (weights[f"{attn}{part}compressor.ape"], weights[f"{attn}{part}compressor.norm.weight"])
            if f"{attn}{part}compressor.ape" in weights
            else None
            for part in ("", "indexer.")
        )  # position bias and norm
        self.index_weight_scale = (config.index_head_dim * config.index_n_heads) ** -0.5

    def __call__(self, x: Tensor, x_fp8: Fp8Rows, step: DeviceStep) -> Tensor:
        """x bf16 [rows, hidden] normed input and the same in E4M3 -> bf16 [rows, hidden]."""
        eps = self.config.rms_norm_eps
        latent, raw, normed = linear_pair(x_fp8, self.w_latent, x, self.w_raw, self.q_norm, eps)
        if normed is None:
            queries = linear_fp8(step.prepare(self, latent, raw), self.w_query)
            output = step.attend(self, queries, raw)
        else:
            output = step.attend_few(self, latent, raw, normed)
        return grouped_out_proj(output, self.wo_a, self.wo_b)

    def keep(self, x_fp8: Fp8Rows, step: DeviceStep) -> None:
        """All that later rows of a layer without entries see of these: store their keys."""
        step.keep(self, linear_fp8(x_fp8, self.w_kv))


class DeviceMoE:
    """Router, shared and routed experts of one layer."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        self.config = config
        gate, experts, shared = (f"{prefix}ffn.{part}." for part in ("gate", "experts", "shared_experts"))
        self.gate_weight, self.bias = weights[gate + "weight"], weights.get(gate + "bias")
        self.tid2eid = weights.get(gate + "tid2eid")
        self.w13: Fp4Weight = weights[experts + "w13"]
        self.w2: Fp4Weight = weights[experts + "w2"]
        self.shared_w13: Fp8Weight = weights[shared + "w13"]
        self.shared_w2: Fp8Weight = weights[shared + "w2.weight"]

    def __call__(self, x: Tensor, x_fp8: Fp8Rows, token_ids: Tensor, step: DeviceStep) -> Tensor:
        """What each expert says, then the shared one: bf16 [rows, K + 1, hidden], to be added in this order.

        x: bf16 [rows, hidden] normed input; x_fp8: the same in E4M3; token_ids: int64 [rows].
        """
        config, (num_tokens, top_k) = self.config, (len(x), self.config.num_experts_per_tok)
        tile_tokens = choose_tile(num_tokens, top_k, self.w13.num_experts, self.w13.form)
        tiles = empty_tiles(num_tokens * top_k, self.w13.num_experts, tile_tokens, x.device)
        rounded = torch.empty_like(x) if self.w13.form == "bf16" else None
        weights, _ = route(
            x,
            self.gate_weight,
            bias=self.bias,
            tid2eid=self.tid2eid,
            token_ids=token_ids,
            top_k=top_k,
            scale=config.routed_scaling_factor,
            positions=step.positions,
            tiles=tiles,
            rounded=rounded,
        )
        return expert_parts(
            *((x_fp8.codes, x_fp8.exponents) if rounded is None else (rounded, rounded)),
            x_fp8,
            weights,
            tiles,
            self.w13,
            self.w2,
            self.shared_w13,
            self.shared_w2,
            limit=config.swiglu_limit,
            activations="fp8",
        )


class DeviceBlock:
    """Attention and MoE, each entered through a boundary that ends the sublayer before it.

    `prefix` is "layers.N." or "mtp.0.", `index` the layer's number in the cache.
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, index: int, frequencies: Tensor) -> None:
        self.config = config
        self.attention = DeviceAttention(config, weights, prefix, index, frequencies)
        self.moe = DeviceMoE(config, weights, prefix)
        self.attn_hc = HyperConnection.load(weights, prefix + "hc_attn_", config.hc_mult)
        self.ffn_hc = HyperConnection.load(weights, prefix + "hc_ffn_", config.hc_mult)
        self.attn_norm, self.ffn_norm = weights[prefix + "attn_norm.weight"], weights[prefix + "ffn_norm.weight"]

    def __call__(self, rows: Streams, token_ids: Tensor, step: DeviceStep) -> Streams:
        """The rows after both sublayers; the second one's output is not added yet."""
        streams, x, x_fp8, post, comb = self._boundary(rows, self.attn_hc, self.attn_norm)
        rows = Streams(streams, self.attention(x, x_fp8, step), post, comb)
        streams, x, x_fp8, post, comb = self._boundary(rows, self.ffn_hc, self.ffn_norm)
        return Streams(streams, self.moe(x, x_fp8, token_ids, step), post, comb)

    def keep(self, rows: Streams, step: DeviceStep) -> None:
        """Store the keys of the rows, which depend on no other row: without attention and experts."""
        self.attention.keep(self._boundary(rows, self.attn_hc, self.attn_norm)[2], step)

    def _boundary(
        self, rows: Streams, hc: HyperConnection, norm: Tensor
    ) -> tuple[Tensor, Tensor, Fp8Rows, Tensor, Tensor]:
        config = self.config
        return mhc_boundary(
            rows.streams,
            hc.fn,
            hc.base,
            hc.scale,
            norm,
            sinkhorn_iters=config.hc_sinkhorn_iters,
            hc_eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
            output=rows.output,
            post=rows.post,
            comb=rows.comb,
        )


class DeviceHead:
    """Collapse of the streams, and the product with the whole vocabulary. `prefix` is "" or "mtp.0."."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        self.config = config
        self.hc = tuple(weights[f"{prefix}hc_head_{part}"] for part in ("fn", "base", "scale"))
        self.norm, self.head = weights[prefix + "norm.weight"], weights["head.weight"]

    def collapse(self, rows: Streams) -> tuple[Tensor, Tensor]:
        """Streams [rows, c, hidden] with all that was to be added, and what `logits` takes: bf16 [rows, hidden]."""
        config = self.config
        return mhc_head(
            rows.streams,
            *self.hc,
            self.norm,
            hc_eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
            output=rows.output,
            post=rows.post,
            comb=rows.comb,
        )

    def logits(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Float32 logits [rows, vocab], in `out` if there is one: exact products, float32 sums."""
        return linear_bf16(x, self.head, out)


class DeviceMtp:
    """The MTP block: `mtp.MtpBlock` in the order of the kernels."""

    def __init__(self, config: ModelConfig, weights: Weights, embedding: Tensor, frequencies: Tensor) -> None:
        self.config, self.embedding = config, embedding
        self.e_proj: Fp8Weight = weights[PREFIX + "e_proj.weight"]
        self.h_proj: Fp8Weight = weights[PREFIX + "h_proj.weight"]
        self.e_norm, self.h_norm = weights[PREFIX + "enorm.weight"], weights[PREFIX + "hnorm.weight"]
        self.block = DeviceBlock(config, weights, PREFIX, config.num_hidden_layers, frequencies)
        self.head = DeviceHead(config, weights, PREFIX)

    def advance(self, streams: Tensor, next_ids: Tensor, step: DeviceStep) -> Streams:
        """Streams bf16 [rows, c, hidden] of positions i, next_ids int64 [rows] = token i + 1 -> the block's own rows,
        whose collapse gives the logits of token i + 2 and whose streams are the input of a chained draft."""
        return self.block(self._mix(streams, next_ids), next_ids, step)

    def keep(self, streams: Tensor, next_ids: Tensor, step: DeviceStep) -> None:
        """Store all that later rows see of these."""
        self.block.keep(self._mix(streams, next_ids), step)

    def _mix(self, streams: Tensor, next_ids: Tensor) -> Streams:
        """The block's input."""
        eps = self.config.rms_norm_eps
        token, hidden = embed_and_norm_fp8(
            self.embedding, next_ids, self.e_norm, streams.flatten(0, 1), self.h_norm, eps
        )
        return Streams(linear_fp8(token, self.e_proj).unsqueeze(1) + linear_fp8(hidden, self.h_proj).view_as(streams))


class DeviceTransformer:
    """The whole network over weights in the device layout; `mtp` is None where the MTP block was not loaded."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.dtype = config, torch.bfloat16
        self.embedding = weights["embed.weight"]
        self.device = self.embedding.device
        frequencies = [rope_table_frequencies(config, kind, self.device).float() for kind in (False, True)]
        self.blocks = [
            DeviceBlock(config, weights, f"layers.{index}.", index, frequencies[ratio > 0])
            for index, ratio in enumerate(config.layer_ratios)
        ]
        self.head = DeviceHead(config, weights, "")
        self.mtp = None
        if PREFIX + "e_proj.weight" in weights:
            self.mtp = DeviceMtp(config, weights, self.embedding, frequencies[False])

    def __call__(self, token_ids: Tensor, step: DeviceStep) -> Streams:
        """token_ids int64 [rows] -> rows after the last layer."""
        embedded = torch.nn.functional.embedding(token_ids, self.embedding)
        rows = Streams(embedded.unsqueeze(1).repeat(1, self.config.hc_mult, 1))
        for block in self.blocks:
            rows = block(rows, token_ids, step)
        return rows

    def logits(self, rows: Streams) -> Tensor:
        """Float32 logits [rows, vocab]."""
        return self.head.logits(self.head.collapse(rows)[1])
