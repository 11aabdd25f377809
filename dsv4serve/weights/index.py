"""What a checkpoint folder holds, from shard headers alone, checked against config.json before anything is allocated.

A safetensors file is: 8 bytes little-endian header length, that many bytes of JSON (name -> dtype, shape,
data_offsets), then the data. The headers are parsed here, and not by the library, because a damaged file
must end in one message that names file, tensor, expected and found.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4serve.config import ModelConfig
from dsv4serve.types import CheckpointError
from dsv4serve.weights.inventory import DTYPE_BYTES, TensorSpec, inventory

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit; also bounds the index (Pro's is 12 MB)


@dataclass(frozen=True)
class CheckpointIndex:
    """Where every tensor is. `files[name]` is a file name inside `directory`, `specs[name]` its dtype and shape."""

    directory: Path
    files: dict[str, str]
    specs: dict[str, TensorSpec]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(spec.num_bytes for spec in self.specs.values())


def verify(directory: Path, config: ModelConfig) -> CheckpointIndex:
    """Check presence, name, dtype and shape of every tensor without reading data.

    Raises CheckpointError, with one message, for the first thing that is wrong.
    """
    weight_map = _read_weight_map(directory)
    shards = list(dict.fromkeys(weight_map.values())) if weight_map is not None else [SINGLE_NAME]
    if weight_map is not None:
        _refuse_relatives(weight_map)  # before headers are read: a relative's folder often lacks shards too
    files: dict[str, str] = {}
    specs: dict[str, TensorSpec] = {}
    for shard in shards:
        for name, spec in read_header(directory / shard).items():
            if name in files:
                raise CheckpointError(f"{directory / shard}: tensor {name!r} is also in {files[name]}; expected once")
            files[name], specs[name] = shard, spec
    if weight_map is None:
        _refuse_relatives(files)
    else:
        _check_weight_map(directory, weight_map, files)
    _check_tensors(directory, inventory(config), files, specs)
    return CheckpointIndex(directory, files, specs)


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Parse and check the header of one safetensors file. Raises CheckpointError when it cannot be right."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or length > file_bytes - 8:
                raise CheckpointError(
                    f"{path}: truncated: the header needs {8 + length} bytes, the file has {file_bytes}"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
            raw = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: shard is missing; the index names it") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    header = _parse_object(raw, f"{path}: safetensors header")
    header.pop("__metadata__", None)
    spans = sorted((_entry(path, name, entry) for name, entry in header.items()), key=lambda span: span[2:])
    position = 0
    for name, _, begin, end in spans:
        if begin != position:
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at data byte {begin}; expected {position} (no gaps or overlaps)"
            )
        position = end
    expected = 8 + length + position
    if file_bytes < expected:
        last = next(name for name, _, _, end in spans if 8 + length + end > file_bytes)
        raise CheckpointError(
            f"{path}: truncated: the header needs {expected} bytes, the file has {file_bytes}; "
            f"tensor {last!r} is cut off"
        )
    if file_bytes > expected:
        raise CheckpointError(f"{path}: {file_bytes - expected} bytes after the last tensor; expected {expected} bytes")
    return {name: spec for name, spec, _, _ in spans}


def _entry(path: Path, name: str, entry: Any) -> tuple[str, TensorSpec, int, int]:
    """Name, spec, first and one-past-last data byte of a header entry."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: header entry is {entry!r}; expected an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where}: dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}")
    if not _is_sizes(shape):
        raise CheckpointError(f"{where}: shape {shape!r}; expected a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets {offsets!r}; expected [begin, end]")
    spec = TensorSpec(dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.num_bytes:
        raise CheckpointError(
            f"{where}: data_offsets span {offsets[1] - offsets[0]} bytes; {spec} needs {spec.num_bytes}"
        )
    return name, spec, offsets[0], offsets[1]


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in value)


def _read_weight_map(directory: Path) -> dict[str, str] | None:
    """Tensor name -> shard of the index file; None when the checkpoint is one file."""
    path = directory / INDEX_NAME
    if not path.is_file():
        if not (directory / SINGLE_NAME).is_file():
            raise CheckpointError(f"{directory}: no weights; expected {INDEX_NAME} or {SINGLE_NAME}")
        return None
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_HEADER_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_HEADER_BYTES} bytes")
    weight_map = _parse_object(raw, str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: 'weight_map' is {type(weight_map).__name__}; expected tensor name -> shard file"
        )
    for name, shard in weight_map.items():
        # A shard name is joined to the folder, so anything but a plain file name could read elsewhere.
        if not isinstance(shard, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", shard):
            raise CheckpointError(
                f"{path}: tensor {name!r} is in {shard!r}; expected a plain file name ending in .safetensors"
            )
    return weight_map


def _parse_object(raw: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise CheckpointError(f"{where}: key {key!r} appears twice")
            values[key] = value
        return values

    try:
        value = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _refuse_relatives(names: dict[str, str]) -> None:
    """Name the checkpoint's real family when its tensor names give it away."""
    for name, shard in names.items():
        if name.startswith("model.") or name == "lm_head.weight":
            v3 = any(".kv_a_proj_with_mqa" in other or ".kv_b_proj" in other for other in names)
            family = "a DeepSeek-V3 checkpoint" if v3 else "in transformers' naming, as DeepSeek-V3 is,"
            raise CheckpointError(
                f"{shard}: tensor {name!r}: this is {family} and not an official DeepSeek-V4 checkpoint; "
                "expected official names such as 'embed.weight' and 'layers.0.attn.wq_a.weight'"
            )
        if re.match(r"mtp\.(\d+\.(main_proj|confidence_head|markov)|[1-9])", name):
            raise CheckpointError(
                f"{shard}: tensor {name!r}: this is a DSpark checkpoint; its draft head is not DeepSeek-V4's MTP block "
                "(expected 'mtp.0.e_proj.weight'). Serve DeepSeek-V4-Pro or DeepSeek-V4-Flash"
            )


def _check_weight_map(directory: Path, weight_map: dict[str, str], files: dict[str, str]) -> None:
    for name, shard in weight_map.items():
        if files.get(name) != shard:
            found = f"it is in {files[name]}" if name in files else "that shard has no such tensor"
            raise CheckpointError(f"{directory / shard}: tensor {name!r}: {INDEX_NAME} expects it here, but {found}")
    for name, shard in files.items():
        if name not in weight_map:
            raise CheckpointError(f"{directory / shard}: tensor {name!r} is not listed in {INDEX_NAME}")


def _check_tensors(
    directory: Path, expected: dict[str, TensorSpec], files: dict[str, str], found: dict[str, TensorSpec]
) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        neighbour = next((files[name] for name in found if _group(name) == _group(missing[0])), "")
        raise CheckpointError(
            f"{directory / neighbour}: tensor {missing[0]!r} is missing; expected {expected[missing[0]]}, "
            f"found none{_and_more(missing)}"
        )
    extra = [name for name in found if name not in expected]
    if extra:
        raise CheckpointError(
            f"{directory / files[extra[0]]}: tensor {extra[0]!r} is not part of this model; expected none, "
            f"found {found[extra[0]]}{_and_more(extra)}"
        )
    wrong = [name for name, spec in expected.items() if found[name] != spec]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{directory / files[name]}: tensor {name!r}: expected {expected[name]}, found {found[name]}"
            f"{_and_more(wrong)}"
        )


def _group(name: str) -> str:
    """The part of the model a tensor belongs to; released checkpoints keep one shard for each."""
    first, second, *_ = [*name.split("."), ""]
    return f"{first}.{second}" if first in ("layers", "mtp") else ""


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
