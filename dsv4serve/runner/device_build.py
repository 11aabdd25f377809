"""From an EngineConfig with device cuda to a runner: refuse what no kernel takes, load, allocate, compile, capture."""

from __future__ import annotations

import torch
import triton

from dsv4_kernels.deterministic import set_deterministic
from dsv4_kernels.mega_moe.weights import form_for
from dsv4serve.config import EngineConfig, ExpertActivations, ModelConfig, Numerics
from dsv4serve.constrained.vocabulary import read_vocabulary
from dsv4serve.memory import CapacityPlan
from dsv4serve.memory.activations import step_bytes
from dsv4serve.model.device import DeviceTransformer
from dsv4serve.obs.kernels import kernels
from dsv4serve.runner.build import cache_plan, require_mtp_block
from dsv4serve.runner.device_batch import bucket_of
from dsv4serve.runner.device_runner import DeviceRunner
from dsv4serve.runner.graphs import max_step_rows
from dsv4serve.types import CapacityError, ConfigError, KernelUnavailable
from dsv4serve.weights.device import device_bytes, require_device_memory
from dsv4serve.weights.device_loader import load_device_weights

RESERVE_BYTES = 1 << 30  # the context, graphs, what the kernels' compiler keeps, holes between allocations


def build_device_runner(config: EngineConfig, model: ModelConfig, progress: bool = False) -> DeviceRunner:
    """Load the model onto the GPU and make every kernel and graph ready.

    Raises:
        ConfigError, KernelUnavailable, CheckpointError, CapacityError: before anything large is allocated.
    """
    triton.knobs.compilation.listener = kernels.observe
    require_settings(config)
    require_kernels(model)
    require_mtp_block(config, model)
    plan = device_plan(config, model, free_device_bytes())
    device = torch.device("cuda", torch.cuda.current_device())
    form = form_for("fp8", torch.cuda.get_device_capability(device)[0])
    set_deterministic(config.deterministic)  # before anything chooses a form
    weights = load_device_weights(config, model, device, form, progress)
    runner = DeviceRunner(
        DeviceTransformer(model, weights),
        plan,
        max_step_tokens=config.max_step_tokens,
        read_vocabulary=lambda: read_vocabulary(config.model, model.vocab_size),
    )
    runner.make_ready(progress)
    return runner


def free_device_bytes() -> int:
    """Bytes that the current GPU has left. Raises ConfigError without one."""
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device is 'cuda', but torch {torch.__version__} finds no CUDA device (driver, container, or a CPU build "
            "of torch); use --device cpu"
        )
    return torch.cuda.mem_get_info()[0]


def reserved_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """What is neither weights nor cache: the largest step, and RESERVE_BYTES."""
    num_requests, num_drafts = config.max_running_requests, config.num_draft_tokens
    num_rows = bucket_of(max_step_rows(config.max_step_tokens, num_requests, num_drafts))
    return RESERVE_BYTES + step_bytes(model, num_rows, bucket_of(num_requests), num_drafts)


def device_plan(config: EngineConfig, model: ModelConfig, free_bytes: int) -> CapacityPlan:
    """The capacity plan on a device with `free_bytes`: the cache gets of what weights and steps leave."""
    reserved, has_drafts = reserved_bytes(config, model), config.num_draft_tokens > 0
    require_device_memory(model, has_drafts, max(0, free_bytes - reserved))
    left = free_bytes - reserved - device_bytes(model, has_drafts)
    if config.cache_bytes > left:
        raise CapacityError(
            f"cache_bytes is {config.cache_bytes:,}; the weights, and {reserved:,} bytes for steps, leave {left:,} on "
            "the device"
        )
    return cache_plan(config, model, left)


def require_settings(config: EngineConfig) -> None:
    """Raise ConfigError for settings that the device engine does not have (yet)."""
    wrong = {
        f"numerics {config.numerics.value!r}": config.numerics is not Numerics.OFFICIAL,
        "check_numerics": config.check_numerics,
        f"shadow_steps {config.shadow_steps}": config.shadow_steps > 0,
        f"expert_activations {config.expert_activations.value!r}": config.expert_activations
        is not ExpertActivations.FP8,
    }
    allowed = "device 'cuda' takes numerics 'official', expert_activations 'fp8', shadow_steps 0 and no check_numerics"
    for setting, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(f"{setting} works on CPU only: {allowed}; change it or use --device cpu")


def require_kernels(model: ModelConfig) -> None:
    """Raise KernelUnavailable, naming the argument, when some kernel does not take this model's sizes."""
    index_dim = model.index_head_dim
    supported = {
        "head_dim": (model.head_dim, model.head_dim in (128, 256, 512), "128, 256 and 512"),
        "qk_rope_head_dim": (model.qk_rope_head_dim, model.qk_rope_head_dim == 64, "64"),
        "hc_mult": (model.hc_mult, model.hc_mult == 4, "4"),
        "index_head_dim": (index_dim, index_dim >= 64 and not index_dim & (index_dim - 1), "powers of two from 64 on"),
        "index_topk": (model.index_topk, model.index_topk <= 2048, "at most 2048"),
        "o_lora_rank": (model.o_lora_rank, model.o_lora_rank % 64 == 0, "multiples of 64"),
        "vocab_size": (model.vocab_size, model.vocab_size <= 1 << 17, "at most 131072"),
        "quantization_config": (model.weight_block_size, model.is_quantized, "FP8 weights in blocks of 128 x 128"),
        "expert_dtype": (model.expert_dtype, model.expert_dtype == "fp4", "'fp4'"),
    }
    for name, (found, is_supported, allowed) in supported.items():
        if not is_supported:
            raise KernelUnavailable(
                f"{name} is {found!r}; the GPU kernels take {allowed}. Use --device cpu, or another checkpoint"
            )
