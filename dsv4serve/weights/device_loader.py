"""Checkpoint files, or random numbers, to weights in the device layout."""

from __future__ import annotations

import logging
import math

import torch

from dsv4_kernels.mega_moe.weights import Form, fill_scales
from dsv4serve.config import EngineConfig, LoadFormat, ModelConfig
from dsv4serve.types import CheckpointError
from dsv4serve.weights.device import DeviceWeight, DeviceWeights
from dsv4serve.weights.dummy import GAINS, fill, fill_distinct
from dsv4serve.weights.index import verify
from dsv4serve.weights.loader import DUMMY_SEED, progress_bar
from dsv4serve.weights.reader import CheckpointReader

logger = logging.getLogger(__name__)

# Largest scale that `mega_moe` unpacks to bf16: it needs 94 of an E8M0 byte's 254 steps for itself.
MAX_FP4_SCALE = 160
FP8_SPREAD = 16.0  # standard deviation of the codes of dummy FP8 weights
FP4_SPREAD = math.sqrt(sum(value * value for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8)  # of random FP4 codes
CHUNK_ROWS = 4096  # of a dummy FP8 weight that exist in float32 at a time


def load_device_weights(
    config: EngineConfig, model: ModelConfig, device: torch.device, form: Form, progress: bool = False
) -> dict[str, DeviceWeight]:
    """Weights of the configured checkpoint in the layout of `device.py`; checked as `load_weights` checks them.

    With the MTP block if drafts are configured. `progress` shows a bar on stderr if that is a terminal.
    Raises CheckpointError for anything wrong with the files.
    """
    has_drafts = config.num_draft_tokens > 0
    if config.load_format is LoadFormat.DUMMY:
        return dummy_device_weights(model, DUMMY_SEED, device, form, has_drafts)
    index = verify(config.model, model)
    loaded, num_rounded = DeviceWeights(model, device, form, has_drafts), 0
    with CheckpointReader(index, model) as reader, progress_bar("loading weights", progress) as bar:
        task = bar.add_task("", total=sum(reader.stored_bytes(name) for name in loaded.specs))
        for name, spec in loaded.specs.items():
            values, scale = reader.read_stored(name)
            if form == "bf16" and spec.dtype == "I8" and scale is not None and int(scale.max()) > MAX_FP4_SCALE:
                raise CheckpointError(
                    f"tensor {name!r} has the scale 2^{int(scale.max()) - 127}; the GPU kernels take FP4 scales up to "
                    f"2^{MAX_FP4_SCALE - 127}"
                )
            num_rounded += loaded.put(name, values, scale)
            bar.advance(task, reader.stored_bytes(name))
    if num_rounded:
        logger.warning(
            "%d groups of 32 expert weights are too small for E4M3 beside the largest of their rows and were rounded",
            num_rounded,
        )
    return loaded.weights


def dummy_device_weights(
    model: ModelConfig, seed: int, device: torch.device, form: Form, has_drafts: bool
) -> dict[str, DeviceWeight]:
    """Random weights of the scales of `dummy_weights` (not its bits), made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    made = DeviceWeights(model, device, form, has_drafts)
    for name in made.specs:
        if made.places[name].expert >= 0:
            continue
        view, exponents = made.view(name)
        if name.endswith(".tid2eid"):
            fill_distinct(view, model.n_routed_experts, generator)
        elif exponents is None:
            fill(view, name, model, generator)
        else:
            exponents.fill_(_exponent(name.split(".")[-2], view.shape[1], FP8_SPREAD))
            for rows in view.split(CHUNK_ROWS):
                values = torch.randn(rows.shape, generator=generator, device=device) * FP8_SPREAD
                rows.copy_(values.clamp(-448, 448).to(torch.float8_e4m3fn))
    for name, weight in made.experts():
        matrix = name.split(".")[-1]
        exponent = _exponent("w1" if matrix == "w13" else matrix, weight.depth, FP4_SPREAD)
        fill_scales(weight, exponent)
        for values in weight.values:  # any bits are codes, in all forms
            values.view(torch.int32).random_(-(1 << 31), (1 << 31) - 1, generator=generator)
    return made.weights


def _exponent(matrix: str, depth: int, spread: float) -> int:
    """E8M0 byte that gives codes of this spread the standard deviation of the matrix."""
    return 127 + round(math.log2(GAINS.get(matrix, 1.0) / math.sqrt(depth) / spread))
