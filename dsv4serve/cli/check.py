"""`dsv4serve check`: what this machine has, what would run, what fits, and whether a checkpoint is sound."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from dsv4serve import __version__
from dsv4serve.cli.flags import add_engine_flags, engine_config
from dsv4serve.config import Device, EngineConfig, LoadFormat, ModelConfig, Numerics
from dsv4serve.obs.memory import available_memory_bytes

if TYPE_CHECKING:
    from dsv4serve.memory import CapacityPlan

MIB = 1 << 20
PACKAGES = ("torch", "triton", "apache-tvm-ffi", "pyzmq", "tokenizers")
OPERATIONS = (
    "compressor",
    "gemm",
    "indexer",
    "kv_store",
    "mega_moe",
    "metadata",
    "mhc",
    "norm",
    "out_proj",
    "quant",
    "rope",
    "router",
    "sampling",
    "sparse_attention",
    "spec_accept",
)
# Placements whose plan is printed besides this machine's: model config, GPUs, bytes per GPU (GB300: data sheet, H200:
# what nvidia-smi shows), slots per GPU. One attention-DP rank per GPU, experts divided. What a real GPU leaves free is
# known only there, so this is a projection.
PLACEMENTS = (("pro", "4 x GB300", 4, 288 * 10**9, 256), ("flash", "2 x H200", 2, 143_771 * MIB, 64))
RESERVE = 0.10  # of a GPU's memory: activations, graphs, communication buffers


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "check",
        help="show environment and capacity plan, verify a checkpoint or golden vectors",
        description="Print environment, kernels and capacity plan, and verify the checkpoint's tensors without loading "
        "them. With --golden, compare a folder of golden vectors instead.",
    )
    parser.add_argument(
        "--golden",
        type=Path,
        metavar="DIR",
        help="folder with config.json, model.safetensors and expected.safetensors: run it through the reference model "
        "and the paged engine, print the largest difference per quantity, exit 1 past the tolerance (default: none)",
    )
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the checks; 0 if all hold, 1 if golden vectors differ. Wrong checkpoints raise (exit code 2)."""
    console = Console(highlight=False, soft_wrap=True)
    if args.golden is not None:
        return _golden(console, args.golden)
    config = engine_config(args)
    _environment(console)
    _kernels(console, config.device)
    _capacity(console, config)
    _checkpoint(console, config)
    return 0


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    console.print(table)


def _environment(console: Console) -> None:
    import torch

    rows: list[tuple[str, object]] = [
        ("dsv4serve", __version__),
        ("python", platform.python_version()),
        ("machine", f"{platform.machine()}, {os.cpu_count()} CPUs"),
        ("accelerator", torch.cuda.get_device_name() if torch.cuda.is_available() else "none: CPU reference path"),
    ]
    for package in PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    _print_table(console, "Environment", ("what", "found"), rows)


def _kernels(console: Console, device: Device) -> None:
    from dsv4_kernels import cpu

    if device is Device.CUDA:
        rows = [(operation, _cuda_backend(operation)) for operation in OPERATIONS]
    else:
        if cpu.library is None:
            console.print("The C kernels are not built: install from the source with a C compiler to have them")
        rows = [
            (operation, "C for float32, else reference" if cpu.takes(operation) else "reference (torch, CPU)")
            for operation in OPERATIONS
        ]
    _print_table(console, f"Kernels, device {device.value}", ("operation", "backend"), rows)


def _cuda_backend(operation: str) -> str:
    """What runs an operation on a GPU: its Triton kernels, or torch where the reference is a few calls that a GPU can
    run as they are."""
    if (resources.files("dsv4_kernels") / operation / "triton.py").is_file():
        return "Triton"
    return {"metadata": "torch on the GPU", "rope": "torch on the GPU, or within other kernels"}.get(operation, "none")


def _capacity(console: Console, config: EngineConfig) -> None:
    from dsv4serve.memory import CacheLayout, plan_capacity
    from dsv4serve.weights.inventory import inventory

    plans = []
    for name, placement, num_gpus, memory_bytes, num_slots in PLACEMENTS:
        raw = json.loads((resources.files("dsv4serve_configs") / "models" / f"{name}.json").read_text("utf-8"))
        model = ModelConfig.from_dict(raw, name)
        weights = sum(
            spec.num_bytes / (num_gpus if ".ffn.experts." in tensor else 1) for tensor, spec in inventory(model).items()
        )
        budget = int(memory_bytes * (1 - RESERVE) - weights)
        layout = CacheLayout.build(model, Numerics.OFFICIAL, num_draft_tokens=1)
        plan = plan_capacity(layout, budget, num_slots, model.max_position_embeddings)
        plans.append((f"{name}, {placement}\nper GPU, projection", plan))
    plans.append((f"{config.model_name}\nthis machine's {config.device.value}", _plan_here(config)))
    rows: list[list[object]] = [
        ["cache bytes", *(plan.total_bytes for _, plan in plans)],
        ["slots", *(plan.num_slots for _, plan in plans)],
        ["pages", *(plan.num_pages for _, plan in plans)],
        ["tails", *(plan.num_tails for _, plan in plans)],
        ["bytes per slot", *(plan.layout.slot_bytes for _, plan in plans)],
        ["bytes per page", *(plan.layout.page_bytes for _, plan in plans)],
        ["bytes per tail", *(plan.layout.tail_bytes for _, plan in plans)],
        ["tokens in all pages", *(plan.num_cached_tokens for _, plan in plans)],
        ["longest request", *(plan.max_model_len for _, plan in plans)],
    ]
    _print_table(console, "Capacity plan", ("quantity", *(name for name, _ in plans)), rows)


def _plan_here(config: EngineConfig) -> CapacityPlan:
    """The plan that `dsv4serve launch` would make. Raises as it would."""
    from dsv4serve.runner import cache_plan

    model = ModelConfig.load(config.model)
    if config.device is Device.CPU:
        return cache_plan(config, model, available_memory_bytes())
    from dsv4serve.runner.device_build import device_plan, free_device_bytes, require_kernels, require_settings

    require_settings(config)
    require_kernels(model)
    return device_plan(config, model, free_device_bytes())


def _checkpoint(console: Console, config: EngineConfig) -> None:
    from dsv4serve.weights.index import verify

    if config.load_format is LoadFormat.DUMMY:
        console.print(f"Checkpoint {config.model}: dummy weights, nothing to verify")
        return
    verify(config.model, ModelConfig.load(config.model))
    console.print(f"Checkpoint {config.model}: every tensor's name, dtype, shape and place in its file is right")


def _golden(console: Console, directory: Path) -> int:
    import torch

    from dsv4serve.cli.golden import TOLERANCE, GoldenFolder, check_engine, check_reference

    torch.set_num_threads(1)
    golden = GoldenFolder(directory)
    results = {"reference": check_reference(golden), "paged engine": check_engine(golden)}
    for title, result in results.items():
        rows: list[tuple[str, object, object]] = [
            (name, f"{value:.2e}", f"<= {TOLERANCE:.0e}") for name, value in result.floats.items()
        ]
        rows += [(name, f"{count} unequal", "0") for name, count in result.mismatches.items()]
        _print_table(
            console, f"Golden vectors through the {title}", ("quantity", "largest difference", "allowed"), rows
        )
        console.print("passed" if result.passed else "FAILED")
    return 0 if all(result.passed for result in results.values()) else 1
