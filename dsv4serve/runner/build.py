"""From an EngineConfig to a runner: read the config, plan memory, load weights, allocate."""

from __future__ import annotations

import torch

from dsv4_kernels import cpu
from dsv4serve.config import Device, EngineConfig, ModelConfig, Numerics
from dsv4serve.constrained.vocabulary import read_vocabulary
from dsv4serve.memory import CacheLayout, CapacityPlan, plan_capacity
from dsv4serve.model.transformer import Transformer
from dsv4serve.obs.kernels import kernels
from dsv4serve.obs.memory import available_memory_bytes
from dsv4serve.runner.runner import Runner
from dsv4serve.runner.sentinel import Sentinel
from dsv4serve.types import ConfigError
from dsv4serve.weights import halve, load_weights


def build_runner(config: EngineConfig, progress: bool = False) -> Runner:
    """Load the model, allocate its cache, and make every kernel: behind this the process serves.

    Raises:
        CheckpointError, ConfigError, CapacityError: before anything large is allocated.
    """
    kernels.start_up()
    torch.set_num_threads(config.threads)
    model = ModelConfig.load(config.model)
    if config.device is Device.CUDA:
        from dsv4serve.runner.device_build import build_device_runner  # Triton is not installed everywhere

        runner: Runner = build_device_runner(config, model, progress)
    else:
        runner = _build_cpu_runner(config, model, progress)
    kernels.serve()
    return runner


def _build_cpu_runner(config: EngineConfig, model: ModelConfig, progress: bool) -> Runner:
    plan = cache_plan(config, model, available_memory_bytes())
    require_mtp_block(config, model)
    weights = load_weights(config, model, progress)
    if cpu.library is not None and config.numerics is Numerics.EXACT:  # torch's kernels would convert them in each step
        halve(weights)
    transformer = Transformer(model, weights, config.numerics, config.expert_activations)
    return Runner(
        transformer,
        plan,
        observer=Sentinel() if config.check_numerics else None,
        read_vocabulary=lambda: read_vocabulary(config.model, model.vocab_size),
        shadow_steps=config.shadow_steps,
    )


def require_mtp_block(config: EngineConfig, model: ModelConfig) -> None:
    """Raise ConfigError when drafts are wanted that the model cannot make."""
    if config.num_draft_tokens and not model.num_nextn_predict_layers:
        raise ConfigError(
            f"num_draft_tokens is {config.num_draft_tokens}, but {config.model} has no MTP block "
            "(num_nextn_predict_layers is 0); use 0"
        )


def cache_plan(config: EngineConfig, model: ModelConfig, free_bytes: int) -> CapacityPlan:
    """The capacity plan that this configuration gets where `free_bytes` are left."""
    layout = CacheLayout.build(model, config.numerics, config.num_draft_tokens)
    budget = config.cache_bytes or int(config.memory_fraction * free_bytes)
    return plan_capacity(
        layout, budget, config.max_running_requests, model.max_position_embeddings, config.max_model_len
    )
