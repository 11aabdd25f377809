"""The multi-token-prediction block (docs/model.md section 10)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4_kernels.gemm import linear
from dsv4_kernels.norm import rms_norm
from dsv4serve.config import ModelConfig
from dsv4serve.model.block import Block, HcHead
from dsv4serve.model.context import StepContext

PREFIX = "mtp.0."


class MtpBlock:
    """Predicts token i + 2 from the streams of position i and token i + 1. Shares embedding and head with the model."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Tensor],
        embedding: Tensor,
        head: Tensor,
        quantize: bool,
        expert_activations: str,
    ) -> None:
        self.config, self.embedding, self.head, self.quantize = config, embedding, head, quantize
        self.e_proj, self.h_proj = params[PREFIX + "e_proj.weight"], params[PREFIX + "h_proj.weight"]
        self.e_norm, self.h_norm = params[PREFIX + "enorm.weight"], params[PREFIX + "hnorm.weight"]
        self.block = Block(config, params, PREFIX, config.num_hidden_layers, quantize, expert_activations)
        self.hc_head = HcHead(config, params, PREFIX)

    def __call__(self, streams: Tensor, next_ids: Tensor, step: StepContext) -> tuple[Tensor, Tensor]:
        """Output streams and `logits` of them; see `advance`."""
        streams = self.advance(streams, next_ids, step)
        return streams, self.logits(streams)

    def advance(self, streams: Tensor, next_ids: Tensor, step: StepContext) -> Tensor:
        """Streams [rows, c, hidden] of positions i (after the last main layer), next_ids int64 [rows] = token i + 1.

        Returns the block's own output streams, which are also the input of a chained draft.
        """
        return self.block(self._mix(streams, next_ids), next_ids, step)

    def keys(self, streams: Tensor, next_ids: Tensor, step: StepContext) -> Tensor:
        """All that later rows see of these: [rows, head_dim], keys of the block's one layer.

        They depend on no other row, so neither attention nor experts run.
        """
        return self.block.keys(self._mix(streams, next_ids), step)

    def _mix(self, streams: Tensor, next_ids: Tensor) -> Tensor:
        """The block's input streams."""
        eps = self.config.rms_norm_eps
        embedded = torch.nn.functional.embedding(next_ids, self.embedding).to(streams.dtype)
        token = rms_norm(embedded, self.e_norm, eps)
        token = linear(token, self.e_proj, quantize=self.quantize)
        normed = rms_norm(streams, self.h_norm, eps).flatten(0, 1)
        hidden = linear(normed, self.h_proj, quantize=self.quantize).view_as(streams)
        return token.unsqueeze(1) + hidden

    def logits(self, streams: Tensor) -> Tensor:
        """Output streams [rows, c, hidden] -> float32 logits [rows, vocab] for token i + 2."""
        return linear(self.hc_head(streams).float(), self.head)
