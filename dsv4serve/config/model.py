"""Model facts: config.json of a DeepSeek-V4 checkpoint, checked field by field.

Names are config.json's own. Everything derived from them (layer kinds, group widths) is a property here,
so no other room re-derives it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dsv4serve.types import CheckpointError, ConfigError

ARCHITECTURE = "DeepseekV4ForCausalLM"
RATIOS = (0, 4, 128)  # the layer kinds: window only, C4 (CSA), C128 (HCA)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN parameters of the compressed layers (`rope_scaling` in config.json)."""

    beta_fast: float
    beta_slow: float
    factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The fields of config.json that decide what is computed."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling
    compress_ratios: tuple[int, ...]  # one per main layer, then one (0) per MTP block
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: int
    expert_dtype: str | None = None  # "fp4" in the released checkpoints; None = BF16 experts
    weight_block_size: tuple[int, int] | None = None  # (128, 128) when dense weights are FP8; None = BF16

    @property
    def nope_head_dim(self) -> int:
        """Leading dims of a head that carry no RoPE."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def layer_ratios(self) -> tuple[int, ...]:
        """Compression ratio of each main layer (0, 4 or 128)."""
        return self.compress_ratios[: self.num_hidden_layers]

    @property
    def is_quantized(self) -> bool:
        """True when dense weights are stored as FP8 with 128x128 block scales."""
        return self.weight_block_size is not None

    @classmethod
    def load(cls, directory: Path) -> ModelConfig:
        """Read `directory`/config.json. Raises CheckpointError when it is missing or not DeepSeek-V4."""
        path = directory / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: not found; a checkpoint folder needs config.json") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
        return cls.from_dict(raw, where=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Check the official fields of `raw`. Raises CheckpointError that names the field and what is allowed."""
        _check_architecture(raw, where)
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in ("rope_scaling", "compress_ratios", "weight_block_size", "expert_dtype"):
                continue
            values[field.name] = _number(raw, field.name, float if field.type == "float" else int, where)
        values["rope_scaling"] = _rope_scaling(raw, where)
        values["compress_ratios"] = _compress_ratios(raw, values, where)
        values["expert_dtype"] = _expert_dtype(raw, where)
        values["weight_block_size"] = _weight_block_size(raw, where)
        config = cls(**values)
        _check_consistency(config, raw, where)
        return config


def _check_architecture(raw: dict[str, Any], where: str) -> None:
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}: expected a JSON object")
    model_type = raw.get("model_type")
    names = raw.get("architectures")
    relatives = {
        "deepseek_v3": "DeepSeek-V3",
        "deepseek_v32": "DeepSeek-V3.2",
        "deepseek_v41": "DeepSeek-V4.1",
        "deepseek_v2": "DeepSeek-V2",
    }
    if isinstance(model_type, str) and model_type in relatives:
        raise CheckpointError(
            f"{where}: this is a {relatives[model_type]} checkpoint (model_type {model_type!r}); "
            "dsv4serve serves DeepSeek-V4 only (model_type 'deepseek_v4')"
        )
    if model_type != "deepseek_v4" or names != [ARCHITECTURE]:
        raise CheckpointError(
            f"{where}: model_type {model_type!r}, architectures {names!r}; "
            f"expected 'deepseek_v4' and ['{ARCHITECTURE}']"
        )
    dspark = sorted(key for key in raw if key.startswith("dspark_"))
    if dspark:
        raise CheckpointError(
            f"{where}: this is a DSpark checkpoint (has {', '.join(dspark)}); its draft head is not the MTP block. "
            "Serve the checkpoint without DSpark (DeepSeek-V4-Pro, DeepSeek-V4-Flash)"
        )


def _number(raw: dict[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in raw:
        raise CheckpointError(f"{where}: field {name!r} is missing")
    value: Any = raw[name]
    if isinstance(value, bool) or not (isinstance(value, int) or (kind is float and isinstance(value, float))):
        raise CheckpointError(f"{where}: field {name!r} is {value!r}; expected a {kind.__name__}")
    if value < 0 or (value == 0 and name not in ("bos_token_id", "num_hash_layers", "num_nextn_predict_layers")):
        raise CheckpointError(f"{where}: field {name!r} is {value!r}; expected a positive number")
    return kind(value)


def _rope_scaling(raw: dict[str, Any], where: str) -> RopeScaling:
    scaling = raw.get("rope_scaling")
    if not isinstance(scaling, dict) or scaling.get("type") != "yarn":
        raise CheckpointError(f"{where}: field 'rope_scaling' is {scaling!r}; expected an object with type 'yarn'")
    inside = f"{where}: rope_scaling"
    return RopeScaling(
        beta_fast=_number(scaling, "beta_fast", float, inside),
        beta_slow=_number(scaling, "beta_slow", float, inside),
        factor=_number(scaling, "factor", float, inside),
        original_max_position_embeddings=_number(scaling, "original_max_position_embeddings", int, inside),
    )


def _compress_ratios(raw: dict[str, Any], values: dict[str, Any], where: str) -> tuple[int, ...]:
    ratios = raw.get("compress_ratios")
    num_main, num_mtp = values["num_hidden_layers"], values["num_nextn_predict_layers"]
    if not isinstance(ratios, list) or any(ratio not in RATIOS for ratio in ratios):
        raise CheckpointError(f"{where}: field 'compress_ratios' is {ratios!r}; expected a list of 0, 4 and 128")
    if len(ratios) != num_main + num_mtp:
        raise CheckpointError(
            f"{where}: field 'compress_ratios' has {len(ratios)} entries; expected {num_main + num_mtp} "
            f"(num_hidden_layers {num_main} + num_nextn_predict_layers {num_mtp})"
        )
    if any(ratios[num_main:]):
        raise CheckpointError(f"{where}: field 'compress_ratios' ends in {ratios[num_main:]}; the MTP block needs 0")
    return tuple(ratios)


def _expert_dtype(raw: dict[str, Any], where: str) -> str | None:
    value = raw.get("expert_dtype")
    if value == "fp8":
        raise CheckpointError(
            f"{where}: expert_dtype 'fp8' is a -Base checkpoint; supported are 'fp4' and unquantised experts"
        )
    if value is None and "quantization_config" in raw:
        return "fp4"  # the first Flash upload had FP4 experts without the field
    if value not in (None, "fp4"):
        raise CheckpointError(f"{where}: field 'expert_dtype' is {value!r}; expected 'fp4'")
    return value


def _weight_block_size(raw: dict[str, Any], where: str) -> tuple[int, int] | None:
    quant = raw.get("quantization_config")
    if quant is None:
        return None
    expected = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    for key, value in expected.items():
        if not isinstance(quant, dict) or quant.get(key) != value:
            found = quant.get(key) if isinstance(quant, dict) else quant
            raise CheckpointError(f"{where}: quantization_config {key!r} is {found!r}; expected {value!r}")
    return (128, 128)


def _check_consistency(config: ModelConfig, raw: dict[str, Any], where: str) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise CheckpointError(f"{where}: {message}")

    scoring = raw.get("scoring_func")
    need(scoring == "sqrtsoftplus", f"scoring_func {scoring!r}; expected 'sqrtsoftplus'")
    need(raw.get("hidden_act") == "silu", f"hidden_act {raw.get('hidden_act')!r}; expected 'silu'")
    need(config.n_shared_experts == 1, f"n_shared_experts {config.n_shared_experts}; expected 1")
    need(config.num_nextn_predict_layers <= 1, "num_nextn_predict_layers above 1 is not DeepSeek-V4's MTP block")
    need(config.num_hash_layers <= config.num_hidden_layers, "num_hash_layers exceeds num_hidden_layers")
    need(config.num_experts_per_tok <= config.n_routed_experts, "num_experts_per_tok exceeds n_routed_experts")
    need(config.num_attention_heads % config.o_groups == 0, "num_attention_heads is not a multiple of o_groups")
    need(config.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim is odd")
    need(config.qk_rope_head_dim < config.head_dim, "qk_rope_head_dim is not below head_dim")
    need(config.qk_rope_head_dim <= config.index_head_dim, "qk_rope_head_dim exceeds index_head_dim")
    power = config.index_head_dim & (config.index_head_dim - 1) == 0
    need(power, f"index_head_dim {config.index_head_dim} is not a power of two (Hadamard transform)")


def require_official_numerics(config: ModelConfig) -> None:
    """Raise ConfigError when this model's shapes do not fit the quantisation groups of `official` numerics."""
    groups = {
        "hidden_size": (config.hidden_size, 128),
        "q_lora_rank": (config.q_lora_rank, 128),
        "moe_intermediate_size": (config.moe_intermediate_size, 128),
        "o_groups * o_lora_rank": (config.o_groups * config.o_lora_rank, 128),
        "head_dim - qk_rope_head_dim": (config.nope_head_dim, 64),
        "index_head_dim": (config.index_head_dim, 32),
    }
    for name, (size, group) in groups.items():
        if size % group:
            raise ConfigError(
                f"numerics 'official' needs {name} ({size}) to be a multiple of {group}; use --numerics exact"
            )
