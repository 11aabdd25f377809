"""Mixture of experts of one layer (docs/model.md section 8): router, routed experts, shared expert."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dsv4_kernels.mega_moe import mega_moe
from dsv4_kernels.router import route
from dsv4serve.config import ModelConfig
from dsv4serve.model.context import StepContext


class MoE:
    """Hash-routed in the first `num_hash_layers` main layers, score-routed elsewhere and in the MTP block."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Tensor],
        prefix: str,
        index: int,
        quantize: bool,
        expert_activations: str,
    ) -> None:
        self.config, self.quantize = config, quantize
        self.activations = expert_activations if quantize else "bf16"
        self.name = prefix + "ffn"
        gate, experts, shared = (f"{self.name}.{part}." for part in ("gate", "experts", "shared_experts"))
        self.gate_weight = params[gate + "weight"]
        self.bias = params.get(gate + "bias")
        self.tid2eid = params.get(gate + "tid2eid")
        self.w13, self.w2 = params[experts + "w13"], params[experts + "w2"]
        self.shared_w13, self.shared_w2 = params[shared + "w13"], params[shared + "w2"]

    def __call__(self, x: Tensor, token_ids: Tensor, step: StepContext) -> Tensor:
        """x [rows, hidden], token_ids int64 [rows] (the rows' input tokens, read by hash layers) -> [rows, hidden]."""
        weights, expert_ids = route(
            x,
            self.gate_weight,
            bias=self.bias,
            tid2eid=self.tid2eid,
            token_ids=token_ids,
            top_k=self.config.num_experts_per_tok,
            scale=self.config.routed_scaling_factor,
        )
        step.observe(f"{self.name}.experts", expert_ids)
        return mega_moe(
            x,
            expert_ids,
            weights,
            self.w13,
            self.w2,
            self.shared_w13,
            self.shared_w2,
            limit=self.config.swiglu_limit,
            activations=self.activations,
            quantize_shared=self.quantize,
        )
