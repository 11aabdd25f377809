"""An engine or a server of one's own: the processes a command starts for itself when no server is asked for."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from dsv4serve.config import EngineConfig, ModelConfig
from dsv4serve.engine.client import EngineClient
from dsv4serve.engine.spawn import ProcessSpec, command, config_values, die_with_parent
from dsv4serve.engine.supervisor import Supervisor
from dsv4serve.obs.logging import configure
from dsv4serve.types import Dsv4Error, EngineUnavailable

ENGINE_MODULE = "dsv4serve.engine.process"
LAUNCHER_MODULE = "dsv4serve.engine.private"
STOP_GRACE_S = 10.0


@asynccontextmanager
async def private_engine(config: EngineConfig) -> AsyncIterator[EngineClient]:
    """Start an engine process, yield a ready client, stop the process.

    Raises SystemExit with the engine's exit code when it fails to start (it has said why on stderr).
    """
    with tempfile.TemporaryDirectory(prefix="dsv4serve-") as directory:
        endpoint = f"ipc://{directory}/engine.sock"
        spec = ProcessSpec(config=config_values(config), endpoint=endpoint, parent_pid=os.getpid())
        process = subprocess.Popen(
            command(ENGINE_MODULE), env=spec.environment(), stdin=subprocess.DEVNULL, start_new_session=True
        )
        client = EngineClient(endpoint)
        try:
            await client.start()
            while not client.is_ready:
                code = process.poll()
                if code is not None:
                    raise SystemExit(code if code > 0 else EngineUnavailable.exit_code)
                await asyncio.sleep(0.02)
            yield client
        finally:
            await client.close()
            _stop(process)


@dataclass(frozen=True)
class PrivateServer:
    """Where a private server answers, and the key that it asks for."""

    url: str
    api_key: str


@contextmanager
def private_server(config: EngineConfig) -> Iterator[PrivateServer]:
    """Start what `launch` starts, on a free loopback port, yield once it answers, stop it at the end.

    Host, port and API keys of `config` are replaced: other users of this machine must not reach the server. Raises
    ConfigError for a wrong model folder, SystemExit with the launcher's exit code when it fails to start (it has said
    why on stderr).
    """
    ModelConfig.load(config.model)
    key = secrets.token_urlsafe()
    config = config.model_copy(
        update={"host": "127.0.0.1", "port": 0, "api_key": (key,), "api_key_file": (), "admin_api_key": ""}
    )
    spec = ProcessSpec(config=config_values(config), endpoint="", parent_pid=os.getpid())
    process = subprocess.Popen(
        command(LAUNCHER_MODULE),
        env=spec.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C in a terminal is for the command, which may want to go on
    )
    assert process.stdout is not None
    try:
        url = next((found[1] for line in process.stdout if (found := re.search(r"ready on (http://\S+)", line))), None)
        if url is None:
            code = process.wait()
            raise SystemExit(code if code > 0 else EngineUnavailable.exit_code)
        yield PrivateServer(url, key)
    finally:
        _stop(process)
        process.stdout.close()


def _stop(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> int:
    """The launcher of a private server: as `dsv4serve launch`, but it ends with the process that started it."""
    spec = ProcessSpec.from_environment()
    die_with_parent(spec.parent_pid)
    config = spec.engine_config()
    configure("launcher", config.log_level, config.log_format)
    try:
        return asyncio.run(_supervise(config))
    except Dsv4Error as error:
        print(f"dsv4serve: {error}", file=sys.stderr, flush=True)
        return error.exit_code


async def _supervise(config: EngineConfig) -> int:
    return await Supervisor(config).run()


if __name__ == "__main__":
    sys.exit(main())
