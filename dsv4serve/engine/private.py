"""An engine of one's own: the process a command starts for itself when no server is asked for."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dsv4serve.config import EngineConfig
from dsv4serve.engine.client import EngineClient
from dsv4serve.engine.spawn import ProcessSpec, command, config_values
from dsv4serve.types import EngineUnavailable

MODULE = "dsv4serve.engine.process"
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
            command(MODULE), env=spec.environment(), stdin=subprocess.DEVNULL, start_new_session=True
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
            process.terminate()
            try:
                process.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
