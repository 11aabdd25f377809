"""Checkpoint files to runtime tensors: verified first, then memory-mapped and dequantised tensor by tensor."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from dsv4serve.config import EngineConfig, LoadFormat, ModelConfig
from dsv4serve.weights.capacity import require_memory
from dsv4serve.weights.dummy import dummy_weights
from dsv4serve.weights.index import verify
from dsv4serve.weights.layout import allocate, official_view, value_specs
from dsv4serve.weights.reader import CheckpointReader

DUMMY_SEED = 0


def load_weights(config: EngineConfig, model: ModelConfig, progress: bool = False) -> dict[str, Tensor]:
    """Runtime tensors (see `layout`) of the configured checkpoint.

    `progress` shows a bar on stderr if that is a terminal. Raises CheckpointError for anything wrong with the files
    and CapacityError when the model does not fit, both before memory is allocated; a bad value inside a tensor is
    found while it is read.
    """
    if config.load_format is LoadFormat.DUMMY:
        return dummy_weights(model, DUMMY_SEED)
    index = verify(config.model, model)
    require_memory(model)
    weights = allocate(model)
    with CheckpointReader(index, model) as reader, progress_bar("loading weights", progress) as bar:
        task = bar.add_task("", total=index.num_bytes)
        for name, _ in value_specs(model):  # shard by shard: the released files follow this order
            official_view(weights, name).copy_(reader.read(name))
            bar.advance(task, reader.stored_bytes(name))
    return weights


def progress_bar(label: str, wanted: bool) -> Progress:
    """A byte-counting bar on stderr; silent unless it is wanted and stderr is a terminal."""
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(
        *columns, console=Console(stderr=True), disable=not (wanted and sys.stderr.isatty()), transient=True
    )
