"""A frontend's side of the engine socket."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from dsv4serve.engine.messages import (
    Abort,
    AbortCall,
    Done,
    EngineInfo,
    EngineStats,
    FlushCache,
    FromFrontend,
    GetStats,
    Hello,
    Outputs,
    Submit,
    decode_from_engine,
    encode,
)
from dsv4serve.types import EngineUnavailable, FinishReason, Request, RequestOutput

logger = logging.getLogger(__name__)

# A stuck engine is found out within 2 * PROBE_S + STUCK_S = 10 s.
PROBE_S = 1.0  # silence after which the engine is asked for a sign of life
STUCK_S = 8.0  # unanswered probe after which it counts as stuck
RECONNECT_MS = 20  # between attempts while no engine listens
LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
CONNECTED = zmq.EVENT_HANDSHAKE_SUCCEEDED


class EngineClient:
    """Submits requests to the engine at `endpoint` and hands each its outputs.

    Every submitted request ends exactly once, also when the engine dies, which the socket's monitor reports at
    once. The client then reconnects by itself: `is_ready` is true again after the next engine answered Hello.
    All methods belong to one event loop.
    """

    def __init__(self, endpoint: str, *, probe_s: float = PROBE_S, stuck_s: float = STUCK_S) -> None:
        self.info: EngineInfo | None = None  # of the last engine that answered
        self._endpoint, self._probe_s, self._stuck_s = endpoint, probe_s, stuck_s
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._ready = asyncio.Event()
        # None: ended on this side, the engine's own end is still to come, so the id cannot be used again yet.
        self._open: dict[str, asyncio.Queue[RequestOutput] | None] = {}
        self._stats: list[asyncio.Future[EngineStats]] = []
        self._unanswered: deque[asyncio.Future[int]] = deque()  # one per Done to come, also when nobody waits any more
        self._asked_at: float | None = None  # when the oldest unanswered probe was sent
        self._heard_at = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to connect; returns at once, see `is_ready` and `wait_ready`."""
        self._tasks = [asyncio.create_task(self._stay_connected()), asyncio.create_task(self._probe())]

    async def close(self) -> None:
        """End what is open with finish_reason abort and free the socket."""
        self._send(Abort([request_id for request_id, queue in self._open.items() if queue is not None]))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._end_all(FinishReason.ABORT, None)
        self._context.destroy(linger=100)

    @property
    def is_ready(self) -> bool:
        """True while connected to an engine that answered Hello."""
        return self._ready.is_set()

    async def wait_ready(self) -> None:
        """Return when `is_ready` becomes true."""
        await self._ready.wait()

    async def is_alive(self) -> bool:
        """False without an engine, or when it has left a probe unanswered for too long (its step loop is stuck)."""
        return self.is_ready and self.unanswered_s < self._stuck_s

    @property
    def unanswered_s(self) -> float:
        """Seconds for which the engine owes an answer; 0 without an engine."""
        if not self.is_ready or self._asked_at is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._asked_at

    async def submit(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Yield the request's outputs; the last and only the last has a finish_reason.

        Failures are outputs too: finish_reason error with `error` and `error_status`. Closing or dropping the
        iterator before its end aborts the request.
        """
        request_id = request.request_id
        if not self.is_ready:
            yield _end(request_id, FinishReason.ERROR, "the engine is not ready", EngineUnavailable.status)
            return
        if request_id in self._open:
            yield _end(request_id, FinishReason.ERROR, f"request id {request_id!r} is already in use", 400)
            return
        queue = self._open[request_id] = asyncio.Queue()
        self._send(Submit(request))
        finished = False
        try:
            while not finished:
                output = await queue.get()
                finished = output.finish_reason is not None
                yield output
        finally:
            if self._open.get(request_id) is queue:
                self._open[request_id] = None
                self._send(Abort([request_id]))

    async def abort(self, request_id: str) -> None:
        """End an open request now with finish_reason abort, whether the engine still answers or not."""
        queue = self._open.get(request_id)
        if queue is not None:
            self._open[request_id] = None
            self._send(Abort([request_id]))
            queue.put_nowait(_end(request_id, FinishReason.ABORT))

    async def abort_call(self, call_id: str | None) -> int:
        """Abort the requests of any frontend whose ids begin with `call_id` and a slash, or all; how many there were.

        Raises EngineUnavailable when none answers in time.
        """
        return await self._done(AbortCall(call_id))

    async def flush_cache(self) -> int:
        """Forget all prefixes; how many pages that freed. Raises EngineUnavailable when none answers in time."""
        return await self._done(FlushCache())

    async def stats(self) -> EngineStats:
        """Ask the step loop for its gauges. Raises EngineUnavailable when none answers in time."""
        if not self.is_ready:
            raise EngineUnavailable("the engine is not ready")
        future: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._stats.append(future)
        self._ask()
        try:
            async with asyncio.timeout(self._stuck_s):
                return await future
        except TimeoutError:
            raise EngineUnavailable(f"the engine has not answered for {self._stuck_s:g} s") from None

    async def _done(self, message: AbortCall | FlushCache) -> int:
        if not self.is_ready:
            raise EngineUnavailable("the engine is not ready")
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._unanswered.append(future)
        self._send(message)
        try:
            async with asyncio.timeout(self._stuck_s):
                return await future
        except TimeoutError:
            raise EngineUnavailable(f"the engine has not answered for {self._stuck_s:g} s") from None

    # Connection

    async def _stay_connected(self) -> None:
        """One socket per connection, so that nothing meant for a dead engine can reach the next one."""
        while True:
            self._socket = socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.SNDHWM, 0)  # sends never wait; what is open bounds what can pile up
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
            monitor: zmq.asyncio.Socket = socket.get_monitor_socket(LOST | CONNECTED)
            socket.connect(self._endpoint)
            receiver = asyncio.create_task(self._receive(socket))
            try:
                while (await recv_monitor_message(monitor))["event"] == CONNECTED:
                    socket.send(encode(Hello()))
                self._drain(socket)  # what the engine said before it died still counts
            finally:
                receiver.cancel()
                await asyncio.gather(receiver, return_exceptions=True)
                self._socket = None
                self._ready.clear()
                self._asked_at = None
                socket.disable_monitor()
                socket.close(linger=100)
            level = logging.WARNING if self._open else logging.INFO
            logger.log(level, "lost the engine; %d requests were open", len(self._open))
            self._end_all(FinishReason.ERROR, "engine died")

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            await socket.poll()
            self._drain(socket)

    def _drain(self, socket: zmq.asyncio.Socket) -> None:
        """Handle what has arrived, without ever suspending, so that no message is lost to a cancellation.

        Not by receiving until zmq.Again: each would be 26 objects in a cycle, and the collector a pause of its own.
        """
        plain: zmq.Socket[bytes] = zmq.Socket.shadow(socket.underlying)
        while plain.poll(0):
            self._handle(plain.recv(zmq.NOBLOCK))

    async def _probe(self) -> None:
        """Ask for a sign of life when the engine has been silent."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._probe_s)
            if self.is_ready and self._asked_at is None and loop.time() - self._heard_at >= self._probe_s:
                self._ask()

    def _ask(self) -> None:
        if self._asked_at is None:
            self._asked_at = asyncio.get_running_loop().time()
        self._send(GetStats())

    def _send(self, message: FromFrontend) -> None:
        """Queue a message to the engine; without a connection it is dropped, as everything open has ended then."""
        if self._socket is not None:
            self._socket.send(encode(message))

    # Messages of the engine

    def _handle(self, payload: bytes) -> None:
        message = decode_from_engine(payload)
        self._heard_at, self._asked_at = asyncio.get_running_loop().time(), None
        match message:
            case Outputs(outputs=outputs):
                for output in outputs:
                    self._deliver(output)
            case EngineStats():
                for future in self._stats:
                    if not future.done():
                        future.set_result(message)
                self._stats.clear()
            case Done(count=count):
                future_count = self._unanswered.popleft()
                if not future_count.done():
                    future_count.set_result(count)
            case EngineInfo():
                self.info = message
                self._ready.set()

    def _deliver(self, output: RequestOutput) -> None:
        queue = self._open.get(output.request_id)
        if queue is not None:
            queue.put_nowait(output)
        if output.finish_reason is not None:
            self._open.pop(output.request_id, None)

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        """End every open request and every waiting question."""
        for request_id, queue in self._open.items():
            if queue is not None:
                queue.put_nowait(_end(request_id, reason, error, None if error is None else 500))
        self._open.clear()
        waiting: list[asyncio.Future[Any]] = [*self._stats, *self._unanswered]
        for future in waiting:
            if not future.done():
                future.set_exception(EngineUnavailable(error or "the client was closed"))
        self._stats.clear()
        self._unanswered.clear()


def _end(
    request_id: str, reason: FinishReason, error: str | None = None, error_status: int | None = None
) -> RequestOutput:
    return RequestOutput(request_id=request_id, finish_reason=reason, error=error, error_status=error_status)
