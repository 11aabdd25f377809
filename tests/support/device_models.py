"""A small quantised model with sizes that the GPU kernels take, as a checkpoint, for both engines."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import torch
from support.models import BASE

from dsv4_kernels.mega_moe.weights import form_for
from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.config import EngineConfig, ModelConfig, Numerics, default_model
from dsv4serve.model.device import DeviceTransformer
from dsv4serve.model.transformer import Transformer
from dsv4serve.weights import dummy_weights, load_weights, write_checkpoint
from dsv4serve.weights.device_loader import load_device_weights
from dsv4serve.weights.export import exported_config
from dsv4serve.weights.layout import official_view
from tools.demo_model.builders.stories import Story

RAW: dict[str, Any] = {
    **BASE,
    "vocab_size": 160,
    "hidden_size": 128,
    "hc_sinkhorn_iters": 2,  # each is many calls of the interpreter
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0],
    "num_attention_heads": 4,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "index_n_heads": 16,  # with few heads many index scores are exactly 0, and how a tie breaks is nobody's contract
    "index_head_dim": 128,
    "index_topk": 4,
    "sliding_window": 16,
    "n_routed_experts": 4,
    "moe_intermediate_size": 128,
}
CONFIG = ModelConfig.from_dict(exported_config(RAW, quantized=True))


def checkpoint(directory: Path) -> Path:
    """Random weights of the model in official format."""
    write_checkpoint(directory, RAW, functools.partial(official_view, dummy_weights(CONFIG, 3)), quantized=True)
    return directory


def both(directory: Path, device: torch.device) -> tuple[Transformer, DeviceTransformer]:
    """The CPU reference with official numerics and the device's network, from one checkpoint; both with MTP block."""
    config = EngineConfig(model=directory, num_draft_tokens=1)
    model = ModelConfig.load(directory)
    reference = Transformer(model, load_weights(config, model), Numerics.OFFICIAL)
    # Where there is no GPU, the form of Hopper.
    form = "fp8" if device.type == "cpu" else form_for("fp8", torch.cuda.get_device_capability(device)[0])
    return reference, DeviceTransformer(model, load_device_weights(config, model, device, form))


def stories(num_tokens: int) -> list[int]:
    """Tokens that the demo model knows what to do with: stories as it has read them, of another seed."""
    draw, text, encode = random.Random(20_261_127), "", ChatTokenizer(default_model()).encode
    while len(tokens := encode(text)) < num_tokens:
        text += Story(draw).write() + "\n\n"
    return tokens[:num_tokens]
