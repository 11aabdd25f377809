"""`dsv4serve convert`: write a checkpoint in another format."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from dsv4serve.types import CheckpointError

DEFAULT_SHARD_GIB = 4.0
# What a folder needs beside config.json and weights to be served.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "encoding")


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="turn a checkpoint into another format",
        description="Verify SRC and write it to DST shard by shard, with its tokenizer. 'bf16' widens FP8 and FP4 "
        "weights exactly, for software that reads only BF16. 'official' quantises BF16 weights to FP8 (128x128 blocks) "
        "and FP4 experts (groups of 32) as released, which rounds them.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint folder to read")
    parser.add_argument("destination", type=Path, metavar="DST", help="new or empty folder to write")
    parser.add_argument("--to", choices=("bf16", "official"), required=True, help="format to write")
    parser.add_argument(
        "--max-shard-gib",
        type=float,
        default=DEFAULT_SHARD_GIB,
        metavar="X",
        help="GiB, largest weight file; also the memory needed (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert; 0 when DST is complete."""
    # Here and not above: these bring torch, and help must be fast.
    from dsv4serve.config import ModelConfig
    from dsv4serve.weights import CheckpointReader, verify, write_checkpoint
    from dsv4serve.weights.loader import progress_bar

    source, destination = args.source, args.destination
    if not args.max_shard_gib > 0:
        raise CheckpointError(f"--max-shard-gib {args.max_shard_gib:g}; expected more than 0")
    model = ModelConfig.load(source)
    index = verify(source, model)
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    with CheckpointReader(index, model) as reader, progress_bar("converting", True) as bar:
        task = bar.add_task("", total=index.num_bytes)
        write_checkpoint(
            destination,
            raw,
            reader.read,
            quantized=args.to == "official",
            max_shard_bytes=int(args.max_shard_gib * (1 << 30)),
            advance=lambda name: bar.advance(task, reader.stored_bytes(name)),
        )
    for name in COMPANIONS:
        if (source / name).is_dir():
            shutil.copytree(source / name, destination / name)
        elif (source / name).exists():
            shutil.copy(source / name, destination / name)
    print(f"wrote {destination}")
    return 0
