"""Writes checkpoints with official names: quantised as released (FP8 and FP4), or in BF16 for other software."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4_kernels.quant import quantize_fp4_weight, quantize_fp8_blocks
from dsv4serve.config import ModelConfig
from dsv4serve.types import CheckpointError
from dsv4serve.weights.index import INDEX_NAME, SINGLE_NAME
from dsv4serve.weights.inventory import TensorSpec, inventory
from dsv4serve.weights.layout import is_quantization_scale

MAX_SHARD_BYTES = 4 << 30
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


def write_checkpoint(
    directory: Path,
    config: dict[str, Any],
    read: Callable[[str], Tensor],
    quantized: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[str], None] = lambda name: None,
) -> None:
    """Write config.json and the weights to `directory`, which must not exist or be empty.

    `config` is a raw config.json; its quantisation fields are replaced by what `quantized` asks for. `read` gives the
    values of an official name that is not a scale (float, int64 for tid2eid): `CheckpointReader.read`, or
    `functools.partial(official_view, weights)` for runtime tensors. At most one shard is held in memory;
    a tensor above `max_shard_bytes` gets a shard of its own.
    `advance` is called with each name written. Quantising is exact for values that this function once quantised.

    Raises CheckpointError when the directory is not empty or the shapes cannot be quantised.
    """
    config = exported_config(config, quantized)
    specs = inventory(ModelConfig.from_dict(config))
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists and is not an empty folder; expected a new one")
    directory.mkdir(parents=True, exist_ok=True)
    shards = _split(specs, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            if not is_quantization_scale(name, specs[name]):
                tensors.update(_encode(name, specs[name], read(name)))
                advance(name)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(directory.stat().st_mode & 0o666)  # the library makes it private to the user
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(spec.num_bytes for spec in specs.values())
        _write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(directory / "config.json", config)  # last: without it a half-written folder is no checkpoint


def exported_config(config: dict[str, Any], quantized: bool) -> dict[str, Any]:
    """`config` (raw config.json) with the quantisation fields of a quantised or a BF16 checkpoint."""
    exported = {key: value for key, value in config.items() if key not in ("quantization_config", "expert_dtype")}
    if quantized:
        exported |= {"expert_dtype": "fp4", "quantization_config": QUANTIZATION}
    return exported


def _split(specs: dict[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where a shard would grow past the limit; a weight and its scale stay together."""
    shards: list[list[str]] = [[]]
    size = 0
    for group in _weights_with_scales(specs):
        num_bytes = sum(specs[name].num_bytes for name in group)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += group
        size += num_bytes
    return shards


def _weights_with_scales(specs: dict[str, TensorSpec]) -> Iterator[list[str]]:
    group: list[str] = []
    for name, spec in specs.items():
        if group and not is_quantization_scale(name, spec):
            yield group
            group = []
        group.append(name)
    yield group


def _encode(name: str, spec: TensorSpec, values: Tensor) -> dict[str, Tensor]:
    """The stored tensors of one official weight."""
    values = values.contiguous()  # runtime matrices lie column by column
    if spec.dtype == "F8_E4M3":
        codes, scale = quantize_fp8_blocks(values.float())
    elif spec.dtype == "I8":
        codes, scale = quantize_fp4_weight(values.float())
    else:
        dtype = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}[spec.dtype]
        return {name: values.to(dtype)}
    return {name: codes, name.removesuffix("weight") + "scale": scale.view(torch.float8_e8m0fnu)}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
