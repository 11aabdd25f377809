"""The JSONL line that a measurement leaves: when, which commit, which command, which machine, what came out."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsv4serve import __version__


def make_record(argv: list[str], device: str, settings: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """One result with what is needed to repeat it. `argv` must hold no secret; `device` "" = this machine."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "version": __version__,
        "command": shlex.join(argv),
        "device": device or this_device(),
        "settings": settings,
        "results": results,
    }


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add `record` as one line to the JSONL file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def commit() -> str:
    """The git commit of this checkout, `-dirty` with uncommitted changes; "" for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    return _output("git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*")


def this_device() -> str:
    """GPU names if there are any, else the processor and how many cores this process may use."""
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    if gpus:
        return f"{len(gpus)} x {gpus[0]}"
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {platform.machine()}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "CPU"


def _output(*command: str) -> str:
    """What `command` prints; "" where it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
