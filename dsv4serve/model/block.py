"""One transformer block with manifold-constrained hyper-connections (docs/model.md section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.mhc import mhc_head, mhc_post, mhc_pre
from dsv4_kernels.norm import rms_norm
from dsv4serve.config import ModelConfig
from dsv4serve.model.attention import Attention
from dsv4serve.model.context import StepContext
from dsv4serve.model.moe import MoE


@dataclass(frozen=True)
class HyperConnection:
    """Parameters that mix the streams around one sublayer."""

    fn: Tensor  # f32 [2 * c + c * c, c * hidden]
    base: Tensor  # f32 [2 * c + c * c]
    scale: Tensor  # f32 [2 * c + c * c]

    @classmethod
    def load(cls, params: Mapping[str, Tensor], prefix: str, hc_mult: int) -> HyperConnection:
        """Read hc parameters named `prefix` + fn, base, scale; each of the three scales is repeated for its mixes."""
        numbers = (hc_mult, hc_mult, hc_mult * hc_mult)
        scales = params[prefix + "scale"].split(1)
        scale = torch.cat([one.expand(number) for one, number in zip(scales, numbers, strict=True)])
        return cls(params[prefix + "fn"], params[prefix + "base"], scale)


class HcHead:
    """Collapse of the streams into one vector: weighted sum, no Sinkhorn, then RMSNorm."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Tensor], prefix: str) -> None:
        self.config = config
        self.fn, self.base, self.scale = (params[f"{prefix}hc_head_{part}"] for part in ("fn", "base", "scale"))
        self.norm = params[prefix + "norm.weight"]

    def __call__(self, streams: Tensor) -> Tensor:
        """Streams [rows, c, hidden] -> normed [rows, hidden]."""
        config = self.config
        merged = mhc_head(streams, self.fn, self.base, self.scale, hc_eps=config.hc_eps, norm_eps=config.rms_norm_eps)
        return rms_norm(merged, self.norm, config.rms_norm_eps)


class Block:
    """Attention and MoE, each wrapped by mHC. `prefix` is "layers.N." or "mtp.0."."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Tensor],
        prefix: str,
        index: int,
        quantize: bool,
        expert_activations: str,
    ) -> None:
        self.config, self.prefix, self._output_name = config, prefix, f"{prefix}ffn.output"
        self.attention = Attention(config, params, prefix, index, quantize)
        self.moe = MoE(config, params, prefix, index, quantize, expert_activations)
        self.attn_hc = HyperConnection.load(params, prefix + "hc_attn_", config.hc_mult)
        self.ffn_hc = HyperConnection.load(params, prefix + "hc_ffn_", config.hc_mult)
        self.attn_norm = params[prefix + "attn_norm.weight"]
        self.ffn_norm = params[prefix + "ffn_norm.weight"]

    def __call__(self, streams: Tensor, token_ids: Tensor, step: StepContext) -> Tensor:
        """Streams [rows, c, hidden] -> the same shape and dtype."""
        x, post, comb = self._enter(streams, self.attn_hc, self.attn_norm)
        streams = mhc_post(self.attention(x, step), streams, post, comb)
        x, post, comb = self._enter(streams, self.ffn_hc, self.ffn_norm)
        output = self.moe(x, token_ids, step)
        step.observe(self._output_name, output)
        streams = mhc_post(output, streams, post, comb)
        step.observe(f"{self.prefix}streams", streams)
        return streams

    def keys(self, streams: Tensor, step: StepContext) -> Tensor:
        """Streams [rows, c, hidden] -> the attention's keys [rows, head_dim], see `Attention.latents`."""
        return self.attention.latents(self._enter(streams, self.attn_hc, self.attn_norm)[0], step)[1]

    def _enter(self, streams: Tensor, hc: HyperConnection, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        merged, post, comb = mhc_pre(
            streams,
            hc.fn,
            hc.base,
            hc.scale,
            sinkhorn_iters=config.hc_sinkhorn_iters,
            hc_eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
        )
        return rms_norm(merged, norm, config.rms_norm_eps), post, comb
