"""Requests with a constraint wait for it beside the step loop, which goes on."""

import contextlib
import os
import threading
from concurrent.futures import Future

import msgspec
import pytest
import zmq
from support.counting_runner import CountingRunner
from support.engine_process import request

from dsv4serve.config import EngineConfig
from dsv4serve.engine.messages import (
    Abort,
    AbortCall,
    Done,
    FromFrontend,
    Outputs,
    Submit,
    decode_from_engine,
    encode,
)
from dsv4serve.engine.process import build_core
from dsv4serve.types import Constraint, FinishReason, InvalidRequest, RequestOutput


class PreparingRunner(CountingRunner):
    """The test decides when a constraint is ready."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Semaphore(0)
        self.futures: list[Future[None]] = []

    def prepare(self, constraint: Constraint) -> Future[None]:
        self.futures.append(Future())
        self.asked.release()
        return self.futures[-1]


class Frontend:
    def __init__(self, socket: zmq.Socket) -> None:
        self.socket = socket

    def send(self, message: FromFrontend) -> None:
        self.socket.send(encode(message))

    def end(self) -> RequestOutput:
        """The next output that ends a request."""
        while True:
            message = decode_from_engine(self.socket.recv())
            assert isinstance(message, Outputs), message
            for output in message.outputs:
                if output.finish_reason is not None:
                    return output


def constrained(request_id: str):
    plain = request(request_id)
    sampling = msgspec.structs.replace(plain.sampling, constraint=Constraint("{}"))
    return Submit(msgspec.structs.replace(plain, sampling=sampling))


@pytest.fixture
def runner():
    return PreparingRunner()


@pytest.fixture
def frontend(endpoint, runner):
    core = build_core(endpoint, EngineConfig(), lambda config: runner)
    thread = threading.Thread(target=lambda: (core.run(), core.close()))
    thread.start()
    with zmq.Context() as context:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 10_000)
        socket.connect(endpoint)
        yield Frontend(socket)
        socket.close()
    core.stop()
    with contextlib.suppress(OSError):
        os.write(core.wake_fd, b"\0")
    thread.join(10)
    assert not thread.is_alive()


def test_others_are_served_while_a_constraint_is_prepared(frontend, runner) -> None:
    frontend.send(constrained("waits"))
    frontend.send(Submit(request("free")))
    assert frontend.end().request_id == "free"
    assert runner.asked.acquire(timeout=10)
    runner.futures[0].set_result(None)  # the loop is idle: this alone must wake it
    output = frontend.end()
    assert (output.request_id, output.finish_reason) == ("waits", FinishReason.LENGTH)


@pytest.mark.parametrize(("error", "status"), [(InvalidRequest("no grammar"), 400), (RuntimeError("a bug"), 500)])
def test_what_cannot_be_prepared_ends_that_request_alone(frontend, runner, error, status) -> None:
    frontend.send(constrained("bad"))
    assert runner.asked.acquire(timeout=10)
    runner.futures[0].set_exception(error)
    output = frontend.end()
    assert (output.finish_reason, output.error_status, output.error) == (FinishReason.ERROR, status, str(error))
    frontend.send(Submit(request("bad")))  # the id is free again
    assert frontend.end().finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("abort", [Abort(["a/1"]), AbortCall("a"), AbortCall(None)], ids=["own", "call", "all"])
def test_an_abort_reaches_a_request_that_is_being_prepared(frontend, runner, abort) -> None:
    frontend.send(constrained("a/1"))
    frontend.send(abort)
    assert frontend.end().finish_reason is FinishReason.ABORT
    if isinstance(abort, AbortCall):
        assert decode_from_engine(frontend.socket.recv()) == Done(1)
    assert runner.asked.acquire(timeout=10)
    runner.futures[0].set_result(None)
    frontend.send(Submit(request("b")))
    assert frontend.end().request_id == "b"


def test_a_frontend_may_be_gone_when_its_requests_cannot_be_prepared(endpoint, runner) -> None:
    """The first refusal finds that nobody is there, which ends the second request as well. Without the loop's thread:
    when a socket learns that its peer left is not in a test's hand, but nobody ever had this identity."""
    core = build_core(endpoint, EngineConfig(), lambda config: runner)
    for name in ("a", "b"):
        core._submit(b"gone", constrained(name).request)
    for future in runner.futures:
        future.set_exception(InvalidRequest("no grammar"))
    core._admit_prepared()
    assert core._stats().num_frontends == 0
    core.close()
