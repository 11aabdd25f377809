"""How the launcher's child processes start and end: what they are told, and that none outlives the launcher.

A child is `python -m MODULE`, not a multiprocessing child: it gets exactly the file descriptors it is given, has no
helper processes, and its process group is its own, so Ctrl-C in a terminal reaches only the launcher, which drains.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import msgspec

from dsv4serve.config import EngineConfig

VARIABLE = "_DSV4SERVE_PROCESS"  # in the environment, not on the command line: the config holds API keys
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PARENT_POLL_S = 0.5


class ProcessSpec(msgspec.Struct, kw_only=True):
    """What a child process is told, as JSON in the environment variable `_DSV4SERVE_PROCESS`."""

    config: dict[str, Any]  # EngineConfig
    endpoint: str  # ipc:// address that the engine binds and frontends connect to
    listen_fd: int = -1  # the bound TCP socket (frontends only)
    parent_pid: int = 0  # the launcher; 0 = unknown
    runner: str = "dsv4serve.runner:build_runner"  # module:function, EngineConfig -> Runner (engine only)

    @classmethod
    def from_environment(cls) -> ProcessSpec:
        """The spec of this process; taken out of the environment so that grandchildren do not see it."""
        return msgspec.json.decode(os.environ.pop(VARIABLE), type=cls)

    def environment(self) -> dict[str, str]:
        """The environment for a child with this spec."""
        return {**os.environ, VARIABLE: msgspec.json.encode(self).decode()}

    def engine_config(self) -> EngineConfig:
        """The configuration; every field is given, so the environment adds nothing."""
        return EngineConfig(**self.config)


def config_values(config: EngineConfig) -> dict[str, Any]:
    """`config` in the form of ProcessSpec.config."""
    values: dict[str, Any] = json.loads(config.model_dump_json())
    return values


def command(module: str) -> list[str]:
    """The command line of a child. -P keeps the current folder out of the import path."""
    return [sys.executable, "-P", "-m", module]


def die_with_parent(parent_pid: int = 0) -> None:
    """Have this process killed when the launcher dies, even when it is stuck in native code.

    Linux does that; elsewhere a thread watches the parent. `parent_pid` tells a parent that died before this call.
    """
    parent_pid = parent_pid or os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)
    else:
        threading.Thread(target=_watch_parent, args=(parent_pid,), daemon=True).start()


def _watch_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_S)
    os._exit(1)
