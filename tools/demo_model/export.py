"""Writes the trained weights as checkpoints: `python -m tools.demo_model.export WEIGHTS OUT --tokenizer DIR`.

OUT/official is the quantised checkpoint (FP8 and FP4), OUT/master the same weights in BF16; both are complete.
"""

from __future__ import annotations

import argparse
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dsv4serve.weights.export import write_checkpoint
from dsv4serve.weights.layout import official_view
from tools.demo_model.config import CONFIG, GENERATION
from tools.demo_model.tokenizer import write_json

SHARD_BYTES = 15 << 20  # of the master


def save(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Runtime tensors as they are trained, float32 (and int64)."""
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, path)


def export(weights: Path, out: Path, tokenizer: Path) -> None:
    """Write both checkpoints from a file that `save` wrote, with the files in the folder `tokenizer`. Raises
    CheckpointError when they exist already."""
    read = functools.partial(official_view, load_file(weights))
    write_checkpoint(out / "official", CONFIG, read, quantized=True)
    write_checkpoint(out / "master", CONFIG, read, quantized=False, max_shard_bytes=SHARD_BYTES)
    for folder in (out / "official", out / "master"):
        write_json(folder / "generation_config.json", GENERATION)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Export trained weights.", allow_abbrev=False)
    parser.add_argument("weights", type=Path, help="weights.safetensors of a training run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    args = parser.parse_args()
    export(args.weights, args.out, args.tokenizer)


if __name__ == "__main__":
    main()
