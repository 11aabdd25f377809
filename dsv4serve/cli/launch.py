"""`dsv4serve launch`: serve a checkpoint over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import sys
from typing import Any

from dsv4serve.cli.flags import add_engine_flags, engine_config
from dsv4serve.config import EngineConfig, ModelConfig
from dsv4serve.engine.supervisor import Supervisor
from dsv4serve.obs.logging import configure

DESCRIPTION = """Start the engine and its HTTP frontends and keep them running.

Without arguments it serves the checkpoint inside the package on http://127.0.0.1:8000. When it prints
"dsv4serve ready", the curl command below that line works. The first Ctrl-C (or SIGTERM) finishes what runs and
refuses what is new; a second one aborts it."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the `launch` command."""
    parser = subparsers.add_parser(
        "launch",
        help="serve a checkpoint over HTTP",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; returns the exit code. Raises ConfigError."""
    config = engine_config(args)
    configure("launcher", config.log_level, config.log_format)
    ModelConfig.load(config.model)  # the wrong folder is one message here, not one of every child
    if not config.read_api_keys() and not is_loopback(config.host):
        print(
            f"dsv4serve: warning: {config.host} is reachable from other machines and no --api-key is set: "
            "anyone there can use this server",
            file=sys.stderr,
        )
    return asyncio.run(serve(config))


async def serve(config: EngineConfig) -> int:
    """Run a supervisor to its end."""
    return await Supervisor(config).run()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
