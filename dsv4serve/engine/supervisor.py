"""The launcher: starts engine and frontends, restarts what dies, drains on SIGTERM, leaves nothing behind.

- A frontend that dies is started again; the listening socket belongs to the launcher, so connections that arrive
  meanwhile wait in its backlog.
- An engine that dies after it was ready is started again, a few times; one that fails at start-up ends the launcher
  with its exit code (2: configuration or checkpoint).
- An engine that is stuck for stuck_restart_s is killed, and then as above; its requests end with an error.
- The first SIGTERM or SIGINT: frontends refuse what is new and finish what runs, then the engine stops; exit code 0.
  A second one, or drain_timeout_s, aborts the rest.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import tempfile
import time
from asyncio.subprocess import DEVNULL, Process
from collections import deque

from dsv4serve.config import EngineConfig
from dsv4serve.engine.client import EngineClient
from dsv4serve.engine.spawn import ProcessSpec, command, config_values
from dsv4serve.obs.kernels import process_age_s
from dsv4serve.obs.metrics import MULTIPROCESS_FOLDER
from dsv4serve.types import ConfigError, EngineUnavailable

logger = logging.getLogger(__name__)

ENGINE_MODULE = "dsv4serve.engine.process"
FRONTEND_MODULE = "dsv4serve.api.process"
RUNNER = "dsv4serve.runner:build_runner"

ENGINE_RESTARTS = (3, 300.0)  # at most so many in so many seconds
FRONTEND_RESTARTS = (5, 60.0)
FRONTEND_RESTART_DELAY_S = 0.2
GRACE_S = 5.0  # from "abort the rest" to SIGKILL
READY_POLL_S = 0.1
STUCK_POLL_S = 0.5
BACKLOG = 1024
MAX_IPC_PATH = 100  # bytes; Unix socket paths hold 107


class Restarts:
    """Allows `limit` restarts within any `period_s` seconds."""

    def __init__(self, limit: int, period_s: float) -> None:
        self._limit, self._period_s = limit, period_s
        self._times: deque[float] = deque()

    def allow(self) -> bool:
        """Count one more restart; False when it is one too many."""
        now = time.monotonic()
        while self._times and now - self._times[0] > self._period_s:
            self._times.popleft()
        self._times.append(now)
        return len(self._times) <= self._limit


class Supervisor:
    """One launch. `runner` and `frontend_module` name what the children run (tests put fakes there)."""

    def __init__(self, config: EngineConfig, *, runner: str = RUNNER, frontend_module: str = FRONTEND_MODULE) -> None:
        self._config, self._runner, self._frontend_module = config, runner, frontend_module
        self._listener = bind(config.host, config.port)
        self._folder = tempfile.mkdtemp(prefix="dsv4serve-")  # mode 0700: only this user reaches the engine
        self._endpoint = f"ipc://{self._folder}/engine"
        if len(self._endpoint) > MAX_IPC_PATH:
            shutil.rmtree(self._folder)
            raise ConfigError(f"the folder for temporary files is too long for a socket: {self._folder}; set TMPDIR")
        self._engine: Process | None = None
        self._client: EngineClient | None = None
        self._frontends: dict[int, Process] = {}
        self._num_signals = 0
        self._draining, self._aborting = asyncio.Event(), asyncio.Event()

    async def run(self) -> int:
        """Run until drained (0) or until something cannot be kept alive (its exit code)."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        engine = asyncio.create_task(self._keep_engine())
        frontends = [asyncio.create_task(self._keep_frontend(index)) for index in range(self._config.frontends)]
        draining = asyncio.create_task(self._draining.wait())
        announcer = asyncio.create_task(self._announce())
        try:
            await asyncio.wait([engine, *frontends, draining], return_when=asyncio.FIRST_COMPLETED)
            if not self._draining.is_set():
                return next(task.result() for task in (engine, *frontends) if task.done())
            announcer.cancel()
            await self._drain(frontends)
            return 0
        finally:
            self._draining.set()  # nobody starts anything any more
            for process in (*self._frontends.values(), self._engine):
                if process is not None and process.returncode is None:
                    process.kill()
            announcer.cancel()
            draining.cancel()
            await asyncio.gather(engine, *frontends, announcer, draining, return_exceptions=True)
            self._listener.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _on_signal(self, number: int) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            logger.info("%s: finishing what runs; once more aborts it", signal.Signals(number).name)
            self._draining.set()
        else:
            logger.info("%s again: aborting what runs", signal.Signals(number).name)
            self._aborting.set()

    # Children

    async def _spawn(self, module: str, pass_fds: tuple[int, ...] = ()) -> Process:
        spec = ProcessSpec(
            config=config_values(self._config),
            endpoint=self._endpoint,
            listen_fd=pass_fds[0] if pass_fds else -1,
            parent_pid=os.getpid(),
            runner=self._runner,
        )
        environment = spec.environment()
        if pass_fds:
            environment[MULTIPROCESS_FOLDER] = self._folder
        # Standard output is the launcher's own; whatever a child prints goes to the log.
        return await asyncio.create_subprocess_exec(
            *command(module), env=environment, stdin=DEVNULL, stdout=2, pass_fds=pass_fds, process_group=0
        )

    async def _keep_engine(self) -> int:
        """Run the engine again and again; returns the exit code with which the launcher must give up."""
        restarts = Restarts(*ENGINE_RESTARTS)
        while True:
            code, was_ready = await self._run_engine()
            if self._draining.is_set():
                return 0
            if not was_ready:
                logger.error("the engine failed to start (%s)", describe(code))
                return code if code > 0 else 1
            if not restarts.allow():
                logger.error("the engine died too often (%s); giving up", describe(code))
                return code if code > 0 else 1
            logger.error("the engine died (%s); starting it again", describe(code))

    async def _run_engine(self) -> tuple[int, bool]:
        """One engine process from start to end: exit code, and whether it ever was ready."""
        self._engine = await self._spawn(ENGINE_MODULE)
        if self._draining.is_set():
            self._engine.kill()  # the signal came while it was being started
        # Its own, so that it cannot mistake an earlier engine for this one.
        client = self._client = EngineClient(self._endpoint)
        await client.start()
        try:
            ready = asyncio.create_task(_log_ready(client))
            guard = asyncio.create_task(_kill_when_stuck(self._engine, client, self._config.stuck_restart_s))
            code = await self._engine.wait()
            was_ready = ready.done()
            ready.cancel()
            guard.cancel()
        finally:
            await client.close()
        return code, was_ready

    async def _keep_frontend(self, index: int) -> int:
        """Run a frontend again and again; returns the exit code with which the launcher must give up."""
        restarts = Restarts(*FRONTEND_RESTARTS)
        while not self._draining.is_set():
            process = self._frontends[index] = await self._spawn(self._frontend_module, (self._listener.fileno(),))
            if self._draining.is_set():
                process.terminate()  # the signal came while it was being started
            code = await process.wait()
            if self._draining.is_set():
                break
            if code == 2:
                return code  # configuration or checkpoint; it has said what is wrong
            if not restarts.allow():
                logger.error("frontend %d died too often (%s); giving up", index, describe(code))
                return code if code > 0 else 1
            logger.error("frontend %d died (%s); starting it again", index, describe(code))
            await asyncio.sleep(FRONTEND_RESTART_DELAY_S)
        return 0

    # Drain

    async def _drain(self, frontends: list[asyncio.Task[int]]) -> None:
        """Frontends first, because they need the engine to finish; then the engine."""
        self._signal_frontends()
        finished = asyncio.create_task(asyncio.wait(frontends))
        aborting = asyncio.create_task(self._aborting.wait())
        timeout_s = self._config.drain_timeout_s
        await asyncio.wait([finished, aborting], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        aborting.cancel()
        if not finished.done():
            logger.warning("aborting the requests that still run")
            self._signal_frontends()
            await asyncio.wait([finished], timeout=GRACE_S)
        for process in self._frontends.values():
            if process.returncode is None:
                process.kill()
        if self._engine is not None and self._engine.returncode is None:
            self._engine.terminate()
            try:
                async with asyncio.timeout(GRACE_S):
                    await self._engine.wait()
            except TimeoutError:
                logger.warning("the engine does not stop; killing it")

    def _signal_frontends(self) -> None:
        for process in self._frontends.values():
            if process.returncode is None:
                process.terminate()

    # Readiness

    async def _announce(self) -> None:
        """Print how to reach the server once it answers."""
        host, port = self._listener.getsockname()[:2]
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        while not (await self._is_connected() and await is_ready(reachable, port)):
            await asyncio.sleep(READY_POLL_S)
        logger.info("the server is ready %.1f s after its launch", process_age_s())
        print(ready_text(self._config, reachable, port), flush=True)

    async def _is_connected(self) -> bool:
        """Whether all frontends have reached the engine: they share one socket, so any may get a connection."""
        try:
            # The launcher's own client is one more.
            return self._client is not None and (await self._client.stats()).num_frontends > self._config.frontends
        except EngineUnavailable:
            return False


async def _log_ready(client: EngineClient) -> None:
    await client.wait_ready()
    logger.info("the engine is ready")


async def _kill_when_stuck(engine: Process, client: EngineClient, limit_s: float) -> None:
    while limit_s:  # 0 = never
        await asyncio.sleep(STUCK_POLL_S)
        if client.unanswered_s >= limit_s:
            logger.error("the engine has not answered for %.0f s; killing it", client.unanswered_s)
            engine.kill()  # nothing gentler reaches a loop that is stuck in native code
            return


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises ConfigError when the address cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; choose --host and --port") from None
    return listener


async def is_ready(host: str, port: int) -> bool:
    """Whether GET /ready answers 200."""
    try:
        async with asyncio.timeout(GRACE_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET /ready HTTP/1.1\r\nHost: {url_host(host)}\r\nConnection: close\r\n\r\n".encode())
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def ready_text(config: EngineConfig, host: str, port: int) -> str:
    """The line that says where the server is, and a curl command that works there."""
    url = f"http://{url_host(host)}:{port}"
    # Without thinking, so that a few tokens are enough to see content.
    body = json.dumps(
        {
            "model": config.model_name,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 32,
            "reasoning_effort": "none",
        }
    )
    words = ["curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    if config.read_api_keys():
        words += ["-H", "Authorization: Bearer YOUR_API_KEY"]
    return f"dsv4serve ready on {url} (model {config.model_name})\n  {shlex.join(words)}"


def url_host(host: str) -> str:
    """`host` as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def describe(code: int) -> str:
    """An exit code of a child in words."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
