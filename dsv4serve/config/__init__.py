"""Model facts (config.json) and engine choices (flags = environment = recipe)."""

from dsv4serve.config.engine import (
    Device,
    DraftMode,
    EffortContract,
    EngineConfig,
    ExpertActivations,
    LoadFormat,
    Numerics,
    default_model,
    load_engine_config,
)
from dsv4serve.config.model import ModelConfig, RopeScaling, require_official_numerics

__all__ = [
    "Device",
    "DraftMode",
    "EffortContract",
    "EngineConfig",
    "ExpertActivations",
    "LoadFormat",
    "ModelConfig",
    "Numerics",
    "RopeScaling",
    "default_model",
    "load_engine_config",
    "require_official_numerics",
]
