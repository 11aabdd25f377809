"""DeepSeek-V4: embedding, blocks over mHC streams, collapse, LM head (docs/model.md section 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4_kernels.gemm import linear
from dsv4serve.config import ExpertActivations, ModelConfig, Numerics, require_official_numerics
from dsv4serve.model.block import Block, HcHead
from dsv4serve.model.context import StepContext
from dsv4serve.model.mtp import MtpBlock


class Transformer:
    """The whole network over one parameter dictionary.

    Args:
        params: float32 tensors by official name as `weights.load_weights` returns them.
        numerics: `exact` runs in float32; `official` in BF16 with every quantisation point. Raises ConfigError when
            the model's sizes do not fit the official quantisation groups.
        expert_activations: of the routed experts in `official` numerics.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Tensor],
        numerics: Numerics,
        expert_activations: ExpertActivations = ExpertActivations.FP8,
    ) -> None:
        quantize = numerics is Numerics.OFFICIAL
        if quantize:
            require_official_numerics(config)
        self.config = config
        self.device = torch.device("cpu")
        self.dtype = torch.bfloat16 if quantize else torch.float32
        self.embedding, self.head = params["embed.weight"], params["head.weight"]
        self.blocks = [
            Block(config, params, f"layers.{index}.", index, quantize, expert_activations)
            for index in range(config.num_hidden_layers)
        ]
        self.hc_head = HcHead(config, params, "")
        self.mtp = None
        if config.num_nextn_predict_layers:
            self.mtp = MtpBlock(config, params, self.embedding, self.head, quantize, expert_activations)

    def __call__(self, token_ids: Tensor, step: StepContext) -> Tensor:
        """token_ids int64 [rows] -> streams [rows, hc_mult, hidden] after the last layer."""
        embedded = torch.nn.functional.embedding(token_ids, self.embedding).to(self.dtype)
        streams = embedded.unsqueeze(1).expand(-1, self.config.hc_mult, -1)
        step.observe("embedding", streams)
        for block in self.blocks:
            streams = block(streams, token_ids, step)
        return streams

    def logits(self, streams: Tensor) -> Tensor:
        """Streams [rows, hc_mult, hidden] -> float32 logits [rows, vocab]; the product is full float32."""
        return linear(self.hc_head(streams).float(), self.head)
