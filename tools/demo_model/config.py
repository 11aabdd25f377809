"""config.json of the demo model: DeepSeek-V4 in everything but size.

Every kind of layer is there (window, C4 with indexer, C128, hash and score routing, MTP), and every matrix fits the
official quantisation groups: columns are multiples of 128, experts are 128 x 256.
"""

from __future__ import annotations

from typing import Any

from dsv4serve.config import ModelConfig
from tools import random_checkpoint

CONFIG: dict[str, Any] = {**random_checkpoint.CONFIG, "vocab_size": 4096, "n_routed_experts": 16}


def model_config() -> ModelConfig:
    """The checked config of the quantised checkpoint."""
    from dsv4serve.weights.export import exported_config

    return ModelConfig.from_dict(exported_config(CONFIG, quantized=True))
