"""The step loop behind a real ROUTER socket, in a thread, against hand-written frontends."""

import contextlib
import os
import threading

import msgspec
import pytest
import zmq
from support.counting_runner import FAIL, STEP_S, VOCAB, CountingRunner
from support.engine_process import request, tokens

from dsv4serve.config import EngineConfig
from dsv4serve.engine.messages import (
    Abort,
    EngineInfo,
    EngineStats,
    GetStats,
    Hello,
    Outputs,
    Submit,
    decode_from_engine,
    encode,
)
from dsv4serve.engine.process import build_core
from dsv4serve.types import FinishReason

TIMEOUT_MS = 10_000


class Frontend:
    """A DEALER that speaks the messages by hand."""

    def __init__(self, context, endpoint):
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
        self.socket.connect(endpoint)

    def send(self, message):
        self.socket.send(encode(message))

    def receive(self):
        return decode_from_engine(self.socket.recv())

    def ask(self, message):
        self.send(message)
        return self.receive()

    def outputs_until_end(self, *request_ids):
        """Outputs of each request, until all have ended."""
        got = {request_id: [] for request_id in request_ids}
        while not all(outputs and outputs[-1].finish_reason for outputs in got.values()):
            message = self.receive()
            assert isinstance(message, Outputs)
            for output in message.outputs:
                assert not got[output.request_id] or got[output.request_id][-1].finish_reason is None
                got[output.request_id].append(output)
        return got


@pytest.fixture(params=[0, 1], ids=["one step at a time", "one step ahead"])
def runner(request):
    return CountingRunner(request.param)


@pytest.fixture
def loop(endpoint, runner):
    """The loop in a thread; what ended it is in .error."""
    core = build_core(endpoint, EngineConfig(max_waiting_requests=4), lambda config: runner)

    class Loop(threading.Thread):
        error = None

        def run(self):
            try:
                core.run()
            except Exception as error:
                self.error = error
            core.close()

    thread = Loop()
    thread.start()
    yield thread
    core.stop()
    with contextlib.suppress(OSError):  # closed: the loop has ended by itself
        os.write(core.wake_fd, b"\0")  # as a signal does; nothing else ends an idle wait
    thread.join(10)
    assert not thread.is_alive()
    assert runner.was_shut_down


@pytest.fixture
def context():
    with zmq.Context() as context:
        yield context
        context.destroy(linger=0)


def test_hello_tells_what_a_frontend_must_know(loop, context, endpoint):
    info = Frontend(context, endpoint).ask(Hello())
    assert isinstance(info, EngineInfo)
    assert (info.vocab_size, info.max_model_len, info.num_slots) == (VOCAB, 4096, 8)


def test_stats_are_answered_by_the_loop(loop, context, endpoint):
    frontend = Frontend(context, endpoint)
    frontend.send(Submit(request("a", max_tokens=3)))
    frontend.outputs_until_end("a")
    stats = frontend.ask(GetStats())
    assert isinstance(stats, EngineStats)
    assert (stats.num_running, stats.num_finished, stats.num_generated_tokens) == (0, 1, 3)
    assert list(stats.step_times) == ["schedule", "prepare", "execute", "sample", "update"]
    assert {sum(times.counts) for times in stats.step_times.values()} == {stats.num_steps}
    assert stats.step_times["execute"].sum >= stats.num_steps * STEP_S


def test_stats_count_the_frontends_that_said_hello(loop, context, endpoint):
    one, two = Frontend(context, endpoint), Frontend(context, endpoint)
    one.ask(Hello())
    two.ask(Hello())
    one.ask(Hello())
    assert one.ask(GetStats()).num_frontends == 2


def test_one_message_per_step_carries_all_requests_of_a_frontend(loop, context, endpoint):
    frontend = Frontend(context, endpoint)
    names = [f"r{i}" for i in range(5)]
    for name in names:
        frontend.send(Submit(request(name, max_tokens=20)))
    sizes = []
    ended = 0
    while ended < len(names):
        message = frontend.receive()
        sizes.append(len(message.outputs))
        assert len({output.request_id for output in message.outputs}) == len(message.outputs)
        ended += sum(output.finish_reason is not None for output in message.outputs)
    assert max(sizes) == 5


def test_two_frontends_may_use_the_same_request_id(loop, context, endpoint):
    one, two = Frontend(context, endpoint), Frontend(context, endpoint)
    one.send(Submit(request("same", prompt=[1], max_tokens=4)))
    two.send(Submit(request("same", prompt=[1, 2, 3], max_tokens=4)))
    assert tokens(one.outputs_until_end("same")["same"]) == [2, 3, 4, 5]
    assert tokens(two.outputs_until_end("same")["same"]) == [4, 5, 6, 7]


def test_a_frontend_cannot_abort_the_request_of_another(loop, context, endpoint):
    one, two = Frontend(context, endpoint), Frontend(context, endpoint)
    one.send(Submit(request("mine", max_tokens=10)))
    two.send(Abort(["mine"]))
    assert one.outputs_until_end("mine")["mine"][-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("asked", "status", "words"),
    [
        (request("x", prompt=[]), 400, "empty"),
        (request("x", prompt=[1] * 4096), 400, "4096"),
        (request("x", prompt=[1, VOCAB]), 400, "outside 0..999"),
        (request("x", prompt=[-1]), 400, "outside 0..999"),
    ],
)
def test_a_request_that_cannot_be_served_is_answered(loop, context, endpoint, asked, status, words):
    (output,) = Frontend(context, endpoint).ask(Submit(asked)).outputs
    assert (output.finish_reason, output.error_status) == (FinishReason.ERROR, status)
    assert words in output.error


def test_a_request_id_in_use_is_refused_and_the_first_goes_on(loop, context, endpoint):
    frontend = Frontend(context, endpoint)
    frontend.send(Submit(request("twice", max_tokens=30)))
    frontend.send(Submit(request("twice", max_tokens=30)))
    outputs = []
    while sum(output.finish_reason is not None for output in outputs) < 2:
        outputs += frontend.receive().outputs
    ends = [output for output in outputs if output.finish_reason is not None]
    assert [(end.finish_reason, end.error_status) for end in ends] == [
        (FinishReason.ERROR, 400),
        (FinishReason.LENGTH, None),
    ]


def test_a_full_queue_is_429(loop, context, endpoint):
    frontend = Frontend(context, endpoint)
    names = [f"r{i}" for i in range(8 + 4 + 20)]
    for name in names:
        frontend.send(Submit(request(name, max_tokens=50)))
    ends = [outputs[-1] for outputs in frontend.outputs_until_end(*names).values()]
    refused = [end for end in ends if end.finish_reason is FinishReason.ERROR]
    assert {end.error_status for end in refused} == {429}
    assert len(refused) >= 1
    assert len(ends) - len(refused) >= 8


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xc1"],
        [b"not msgpack at all"],
        [encode(Hello())[:-1]],
        [msgspec.msgpack.encode({"type": "submit", "request": {"request_id": 7}})],
        [msgspec.msgpack.encode({"type": "no such message"})],
        [msgspec.msgpack.encode({"type": "submit", "request": None})],
        [b"\x91" * 100_000 + b"\x90"],
        [encode(Hello()), encode(Hello())],
        [b"", encode(Hello())],
    ],
    ids=lambda frames: repr(frames[0][:20]),
)
def test_malformed_bytes_are_dropped(loop, context, endpoint, frames, caplog):
    frontend = Frontend(context, endpoint)
    frontend.socket.send_multipart(frames)
    assert isinstance(frontend.ask(Hello()), EngineInfo)  # nothing else was answered before
    assert "malformed" in caplog.text


def test_the_requests_of_a_vanished_frontend_are_aborted(loop, context, endpoint):
    gone, stays = Frontend(context, endpoint), Frontend(context, endpoint)
    for i in range(6):
        gone.send(Submit(request(f"r{i}", max_tokens=4000)))
    gone.receive()
    gone.socket.close()
    for _ in range(200):
        stats = stays.ask(GetStats())
        if stats.num_running == stats.num_waiting == 0:
            break
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    stays.send(Submit(request("after")))
    assert stays.outputs_until_end("after")["after"][-1].finish_reason is FinishReason.LENGTH


def test_a_runner_that_raises_ends_every_request_with_an_error(loop, context, endpoint):
    one, two = Frontend(context, endpoint), Frontend(context, endpoint)
    one.send(Submit(request("a", max_tokens=4000)))
    one.receive()
    two.send(Submit(request("b", prompt=[FAIL])))
    for frontend, name in ((one, "a"), (two, "b")):
        end = frontend.outputs_until_end(name)[name][-1]
        assert (end.finish_reason, end.error_status) == (FinishReason.ERROR, 500)
        assert "NaN in the logits" in end.error
    loop.join(10)
    assert isinstance(loop.error, FloatingPointError)


def settled(frontend, runner):
    """The events of the runner once every step has ended."""
    for _ in range(200):
        frontend.ask(GetStats())
        kinds = [kind for kind, _ in runner.events]
        if kinds.count("submit") == kinds.count("result"):
            break
    assert kinds.count("submit") == kinds.count("result")
    return list(runner.events)


def test_the_next_step_is_submitted_before_the_result_of_the_last_one_where_the_runner_can(
    loop, context, endpoint, runner
):
    frontend = Frontend(context, endpoint)
    frontend.send(Submit(request("a", max_tokens=6)))
    outputs = frontend.outputs_until_end("a")["a"]
    assert tokens(outputs) == [4, 5, 6, 7, 8, 9]
    events, ahead = settled(frontend, runner), runner.steps_ahead
    steps = [step for kind, step in events if kind == "submit"]
    assert [step for kind, step in events if kind == "result"] == steps == list(range(6))
    for step in steps[: len(steps) - ahead]:
        assert events.index(("result", step)) > events.index(("submit", step + ahead))
        if step + ahead + 1 < len(steps):
            assert events.index(("result", step)) < events.index(("submit", step + ahead + 1))


def test_a_step_whose_requests_were_all_aborted_still_ends(loop, context, endpoint, runner):
    frontend = Frontend(context, endpoint)
    for name in ("a", "b"):
        frontend.send(Submit(request(name, max_tokens=4000)))
        frontend.receive()
        frontend.send(Abort([name]))
        frontend.outputs_until_end(name)
    settled(frontend, runner)
