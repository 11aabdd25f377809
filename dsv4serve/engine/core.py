"""The step loop: receive, schedule, execute, update, reply.

One thread does everything, so there is nothing to lock and a liveness probe that is answered proves that steps
move on. While a GPU computes a step the next one is planned and submitted, if the runner can hold that many: the
scheduler counts on what is planned, and the token between the two never visits the host.

A frontend is known by its ZMQ identity; it owns the requests it submitted, and two frontends may use the same request
id.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import asdict
from time import perf_counter

import msgspec
import zmq

from dsv4serve.engine.messages import (
    Abort,
    AbortCall,
    Done,
    EngineInfo,
    EngineStats,
    FlushCache,
    FromEngine,
    GetStats,
    Hello,
    Outputs,
    Submit,
    decode_from_frontend,
    encode,
)
from dsv4serve.engine.pipeline import Pipeline
from dsv4serve.engine.runner_protocol import Runner
from dsv4serve.obs.acceptance import AcceptanceWatch
from dsv4serve.obs.histogram import StepHistogram
from dsv4serve.obs.kernels import kernels
from dsv4serve.scheduler import Scheduler
from dsv4serve.types import (
    Constraint,
    Dsv4Error,
    FinishReason,
    InvalidRequest,
    Request,
    RequestOutput,
    StepOutput,
)

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20  # a prompt of a million ids takes 5 MB; a larger message closes that connection
MAX_MESSAGES_PER_STEP = 1024  # so that a flood of messages cannot stop the steps
PHASES = ("schedule", "prepare", "execute", "sample", "update")  # of a step, in order
LINGER_MS = 2000  # how long the last replies of a failing engine may take


class EngineCore:
    """Owns the ROUTER socket at `endpoint` and drives `scheduler` and `runner`. `watch` is told what is accepted."""

    def __init__(
        self,
        endpoint: str,
        scheduler: Scheduler,
        runner: Runner,
        info: EngineInfo,
        watch: AcceptanceWatch | None = None,
    ) -> None:
        self._scheduler, self._runner, self._info = scheduler, runner, info
        self._pipeline = Pipeline(scheduler, runner)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        # Unbounded, because dropping a reply would lose an end; what is open bounds what can pile up.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.bind(endpoint)
        # A byte here ends a wait. Without it a signal that comes between the last check of Python for signals and the
        # wait itself would not be seen until the next message.
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_sender.setblocking(False)
        self._wake_receiver.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_receiver, zmq.POLLIN)
        self._stopping = False
        # The scheduler's id of each open request -> (identity, the frontend's id); and the ids of each frontend.
        self._owners: dict[str, tuple[bytes, str]] = {}
        self._requests: dict[bytes, dict[str, str]] = {}
        # Open requests whose constraint is being prepared, by the scheduler's id.
        self._preparing: dict[str, tuple[Future[None], Request]] = {}
        self._watch = watch
        self._num_nonfinite_drafts, self._num_nonfinite_steps = 0, 0
        self._num_shadow_rows, self._num_shadow_flips, self._shadow_drift = 0, 0, 0.0
        self._step_times = {phase: StepHistogram() for phase in PHASES}

    @property
    def wake_fd(self) -> int:
        """Non-blocking descriptor for `signal.set_wakeup_fd`: a byte written to it ends a wait for messages."""
        return self._wake_sender.fileno()

    def stop(self) -> None:
        """Make `run` return after the step it is in. For signal handlers."""
        self._stopping = True

    def run(self) -> None:
        """Serve until `stop`, or until scheduler or runner fail.

        After a failure every open request has been answered with finish_reason error.
        """
        try:
            while not self._stopping:
                self._receive()
                self._admit_prepared()
                self._step()
        except Exception as error:
            self._fail_all(f"the engine failed: {type(error).__name__}: {error}")
            raise

    def close(self) -> None:
        """Send what is queued and free the socket and the runner."""
        self._socket.close(linger=LINGER_MS)
        self._context.term()
        self._wake_receiver.close()
        self._wake_sender.close()
        self._runner.shutdown()

    def _step(self) -> None:
        step = self._pipeline.step()
        if step is None:
            return
        begin, result = perf_counter(), step.result
        self._reply(self._scheduler.update(step.planned, result))
        if step.planned.verifies or result.first_nonfinite or result.num_shadow_rows:
            self._look_at(result)
        times = self._step_times
        times["schedule"].observe(step.schedule_s)
        times["prepare"].observe(result.prepare_s)
        times["execute"].observe(max(0.0, step.seconds - result.prepare_s - result.sample_s))
        times["sample"].observe(result.sample_s)
        times["update"].observe(perf_counter() - begin)

    def _look_at(self, result: StepOutput) -> None:
        """Whether what the step computed is what it should be."""
        self._num_nonfinite_drafts += result.num_nonfinite_drafts
        if result.first_nonfinite:
            self._num_nonfinite_steps += 1
        if result.num_shadow_rows:
            self._num_shadow_rows += result.num_shadow_rows
            self._num_shadow_flips += result.num_shadow_flips
            self._shadow_drift = result.shadow_drift
        if self._watch is not None:
            stats = self._scheduler.stats()
            line = self._watch.observe(stats.num_drafted, stats.num_accepted, self._num_nonfinite_drafts)
            if line is not None:
                logger.log(logging.WARNING if self._watch.is_low else logging.INFO, "%s", line)

    # Receiving

    def _receive(self) -> None:
        """Handle what has arrived; wait for a message when there is nothing to run."""
        if not self._pipeline.has_work:
            self._poller.poll()
            with contextlib.suppress(BlockingIOError):
                self._wake_receiver.recv(4096)
        for _ in range(MAX_MESSAGES_PER_STEP):
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle(identity, frames)

    def _handle(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            (payload,) = frames
            message = decode_from_frontend(payload)
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            logger.warning("dropped a malformed message of frontend %s: %s", identity.hex(), error)
            return
        match message:
            case Submit(request=request):
                self._submit(identity, request)
            case Abort(request_ids=request_ids):
                self._abort(identity, request_ids)
            case AbortCall(call_id=call_id):
                self._send(identity, Done(self._abort_call(call_id)))
            case FlushCache():
                self._send(identity, Done(self._scheduler.flush_prefix_cache()))
            case GetStats():
                self._send(identity, self._stats())
            case Hello():
                self._requests.setdefault(identity, {})
                self._send(identity, self._info)

    def _stats(self) -> EngineStats:
        watch = self._watch
        return EngineStats(
            **asdict(self._scheduler.stats()),
            num_frontends=len(self._requests),
            step_times=self._step_times,
            ready_s=kernels.ready_s,
            kernels=kernels.phases,
            num_nonfinite_drafts=self._num_nonfinite_drafts,
            num_nonfinite_steps=self._num_nonfinite_steps,
            num_shadow_rows=self._num_shadow_rows,
            num_shadow_flips=self._num_shadow_flips,
            shadow_drift=self._shadow_drift,
            num_accept_alarms=watch.num_alarms if watch is not None else 0,
            is_accept_rate_low=watch is not None and watch.is_low,
        )

    def _submit(self, identity: bytes, request: Request) -> None:
        mine = self._requests.setdefault(identity, {})
        internal = f"{identity.hex()}:{request.request_id}"
        try:
            if request.request_id in mine:
                raise InvalidRequest(f"request id {request.request_id!r} is already in use", "request_id")
            self._check_ids(request)
            renamed = msgspec.structs.replace(request, request_id=internal)
            if request.sampling.constraint is None:
                self._scheduler.add(renamed)
            else:
                self._preparing[internal] = (self._prepare(request.sampling.constraint), renamed)
        except Dsv4Error as error:
            self._send(identity, Outputs([_error(request.request_id, str(error), error.status)]))
            return
        mine[request.request_id] = internal
        self._owners[internal] = (identity, request.request_id)

    def _prepare(self, constraint: Constraint) -> Future[None]:
        future = self._runner.prepare(constraint)
        future.add_done_callback(lambda _: self._wake())
        return future

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes already; closed: nobody waits
            self._wake_sender.send(b"\0")

    def _admit_prepared(self) -> None:
        """Hand the scheduler what is ready now."""
        for internal in [name for name, (future, _) in self._preparing.items() if future.done()]:
            if internal not in self._preparing:
                continue  # the reply to one before it found that their frontend is gone
            future, request = self._preparing.pop(internal)
            try:
                future.result()
                self._scheduler.add(request)
            except Exception as error:  # of a library that compiles what a client sent: it ends that request alone
                status = error.status if isinstance(error, Dsv4Error) else 500
                self._reply([_error(internal, str(error), status)])

    def _check_ids(self, request: Request) -> None:
        """An id outside the vocabulary would end the process, and with it everybody's requests."""
        ids, size = request.prompt_ids, self._info.vocab_size
        if ids and not (min(ids) >= 0 and max(ids) < size):
            raise InvalidRequest(f"the prompt has token ids outside 0..{size - 1}", "prompt")

    def _abort(self, identity: bytes, request_ids: Iterable[str]) -> None:
        mine = self._requests.get(identity, {})
        aborted = (self._end(mine[request_id]) for request_id in request_ids if request_id in mine)
        self._reply([output for output in aborted if output is not None])

    def _end(self, internal: str) -> RequestOutput | None:
        """Abort a request, wherever it is."""
        if self._preparing.pop(internal, None) is not None:
            return RequestOutput(request_id=internal, finish_reason=FinishReason.ABORT)
        return self._scheduler.abort(internal)

    def _abort_call(self, call_id: str | None) -> int:
        """Abort a call's requests, or all, whoever submitted them. Returns how many there were."""
        found = [
            internal
            for internal, (_, request_id) in self._owners.items()
            if call_id is None or request_id.startswith(call_id + "/")
        ]
        aborted = [output for internal in found if (output := self._end(internal)) is not None]
        self._reply(aborted)
        return len(aborted)

    # Replying

    def _reply(self, outputs: list[RequestOutput]) -> None:
        """One message per frontend; its own request ids restored."""
        batches: dict[bytes, list[RequestOutput]] = {}
        for output in outputs:
            identity, request_id = self._owners[output.request_id]
            if output.finish_reason is not None:
                del self._owners[output.request_id]
                del self._requests[identity][request_id]
            output.request_id = request_id
            batches.setdefault(identity, []).append(output)
        for identity, batch in batches.items():
            self._send(identity, Outputs(batch))

    def _send(self, identity: bytes, message: FromEngine) -> None:
        try:
            self._socket.send_multipart((identity, encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._forget(identity)

    def _forget(self, identity: bytes) -> None:
        """The frontend is gone: nobody waits for its requests."""
        internals = self._requests.pop(identity, {}).values()
        logger.warning("frontend %s is gone; aborting its %d requests", identity.hex(), len(internals))
        for internal in internals:
            del self._owners[internal]
            self._end(internal)

    def _fail_all(self, text: str) -> None:
        """Answer everybody who waits."""
        for identity, mine in list(self._requests.items()):
            if mine:
                self._send(identity, Outputs([_error(request_id, text, 500) for request_id in mine]))


def _error(request_id: str, text: str, status: int) -> RequestOutput:
    return RequestOutput(request_id=request_id, finish_reason=FinishReason.ERROR, error=text, error_status=status)
