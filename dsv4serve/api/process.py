"""A frontend process: `python -m dsv4serve.api.process`, started by the supervisor with its listening socket.

SIGTERM drains: /ready and new requests answer 503 while the running ones finish, then the process exits with 0. A
second SIGTERM, or the drain timeout, aborts what still runs; its clients get a proper end of their stream.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from types import FrameType

import uvicorn
import uvloop

from dsv4serve.api.app import create_app
from dsv4serve.api.frontend import Frontend
from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.engine.client import EngineClient
from dsv4serve.engine.spawn import ProcessSpec, die_with_parent
from dsv4serve.obs.logging import configure
from dsv4serve.types import Dsv4Error

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than the idle limit of common HTTP clients, so that they close first
ABORT_GRACE_S = 5.0  # for aborted streams to be written out
SWITCH_S = 0.001
GC_OBJECTS = 50_000
CLOSE_GRACE_S = 2  # for connections to close once nothing runs


class DrainingServer(uvicorn.Server):
    """uvicorn that keeps accepting (to answer 503) until the requests inside are done."""

    def __init__(self, config: uvicorn.Config, frontend: Frontend) -> None:
        super().__init__(config)
        self._frontend = frontend
        self._num_signals = 0
        self._deadline = float("inf")  # loop time of the next, harder measure
        self._aborted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: abort. Not recorded for uvicorn, which would die of it after its shutdown."""
        self._num_signals += 1
        self._frontend.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second by uvicorn; true ends the server."""
        if self._num_signals:
            await self._drain(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    async def _drain(self, now: float) -> None:
        frontend = self._frontend
        if self._deadline == float("inf"):
            self._deadline = now + frontend.config.drain_timeout_s
            logger.info("draining: %d requests still run", frontend.num_active)
        if frontend.num_active == 0 or (self._aborted and now >= self._deadline):
            self.should_exit = True
        elif not self._aborted and (self._num_signals > 1 or now >= self._deadline):
            logger.warning("aborting %d requests", frontend.num_active)
            self._aborted, self._deadline = True, now + ABORT_GRACE_S
            await frontend.abort_all()


async def serve(spec: ProcessSpec) -> None:
    """Serve on the inherited socket until drained."""
    config = spec.engine_config()
    client = EngineClient(spec.endpoint)
    app = create_app(config, client, ChatTokenizer(config.model))
    frontend: Frontend = app.state.frontend
    settings = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=config.log_level == "debug",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_GRACE_S,
    )
    await client.start()
    # Rendering and tokenising run in threads: the loop must not wait 5 ms, Python's default, each time it wants to run.
    sys.setswitchinterval(SWITCH_S)
    # Modules and vocabulary live as long as the process: the collector need not look at them again. A large body is
    # 100,000 new objects: with Python's threshold of 700 the collector takes half of the time in which it is parsed.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_OBJECTS)
    watchers = [asyncio.create_task(frontend.live.run()), asyncio.create_task(frontend.live.watch_loop())]
    try:
        await DrainingServer(settings, frontend).serve(sockets=[socket.socket(fileno=spec.listen_fd)])
    finally:
        for watcher in watchers:
            watcher.cancel()
        await client.close()
        frontend.close()


def main() -> int:
    """Exit code 0 after a drain, 2 for a wrong configuration or checkpoint."""
    spec = ProcessSpec.from_environment()
    die_with_parent(spec.parent_pid)
    configure("frontend", spec.config["log_level"], spec.config["log_format"], in_thread=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(spec))
    except Dsv4Error as error:
        print(f"dsv4serve: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
