"""A checkpoint's generation_config.json: what sampling does where a request says nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from dsv4serve.types import CheckpointError

MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class SamplingDefaults:
    """Defaults for fields of the same names."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


# name -> smallest, largest, whether the smallest itself is allowed
RANGES = {
    "temperature": (0.0, 2.0, True),
    "top_p": (0.0, 1.0, False),
    "top_k": (0, 2**31 - 1, True),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, 2.0, False),
}


def read_generation_config(directory: Path) -> SamplingDefaults:
    """The defaults in `directory`/generation_config.json, if there is one. Raises CheckpointError for a wrong value."""
    path = directory / "generation_config.json"
    try:
        with path.open("rb") as file:
            raw = orjson.loads(file.read(MAX_FILE_BYTES))
    except FileNotFoundError:
        raw = {}
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    found: dict[str, Any] = {}
    for name, (smallest, largest, is_closed) in RANGES.items():
        value = raw.get(name)
        if value is None:
            continue
        kind = int if name == "top_k" else float
        is_number = isinstance(value, int | kind) and not isinstance(value, bool)
        if not is_number or not (smallest <= value <= largest) or (value == smallest and not is_closed):
            above = "from" if is_closed else "above"
            raise CheckpointError(f"{path}: {name} is {value!r}; expected a number {above} {smallest:g} to {largest:g}")
        found[name] = kind(value)
    return SamplingDefaults(**found)
