"""The launcher as a process, with real children: restarts, drains, exit codes, and no orphans."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from support.counting_runner import expected_token
from support.engine_process import wait_gone
from support.fake_frontend import EXIT_AT_START

from dsv4serve.engine import supervisor
from dsv4serve.engine.supervisor import Restarts, bind
from dsv4serve.types import ConfigError

TIMEOUT_S = 20
PROMPT_LENGTH = 3


class Launch:
    """A running launcher."""

    def __init__(self, tmp_path, builder="build", **settings):
        self.folder = tmp_path
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.fake_launcher", json.dumps({"port": 0, **settings}), builder],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=(tmp_path / "log").open("w"),
            text=True,
            process_group=0,
        )
        self.pids = set()

    def wait_ready(self):
        line = self.process.stdout.readline()
        self.port = int(re.fullmatch(r"dsv4serve ready on http://127\.0\.0\.1:(\d+) \(model .+\)\n", line)[1])
        self.note_children()
        return self

    def log(self):
        return (self.folder / "log").read_text()

    def note_children(self):
        self.pids |= {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}

    def child(self, word):
        """The pid of the child whose command line has `word`."""
        children = psutil.Process(self.process.pid).children()
        self.note_children()
        (found,) = [child.pid for child in children if word in " ".join(child.cmdline())]
        return found

    def wait_child(self, word, other_than):
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                pid = self.child(word)
                if pid != other_than:
                    return pid
            except (ValueError, psutil.NoSuchProcess):
                pass
            time.sleep(0.02)
        raise AssertionError(f"{word} was not started again\n{self.log()}")

    def wait_code(self):
        """The exit code; afterwards nothing is left, no process and no file."""
        code = self.process.wait(TIMEOUT_S)
        wait_gone(self.pids)
        assert [path.name for path in self.folder.iterdir()] == ["log"]
        return code

    def get(self, path):
        """(status, body); the body may end early when the server dies."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def wait_http_ready(self):
        deadline = time.monotonic() + TIMEOUT_S
        while self.get("/ready")[0] != 200:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def stream(self, num_tokens):
        return Stream(self, num_tokens)


class Stream(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, launch, num_tokens):
        super().__init__()
        self.launch, self.num_tokens = launch, num_tokens
        self.lines = None
        self.started = threading.Event()
        self.start()
        assert self.started.wait(TIMEOUT_S)

    def run(self):
        with socket.create_connection(("127.0.0.1", self.launch.port), TIMEOUT_S) as connection:
            connection.sendall(f"GET /generate/{self.num_tokens} HTTP/1.1\r\n\r\n".encode())
            file = connection.makefile()
            while header := file.readline().strip():
                if header.startswith("X-Pid: "):
                    self.frontend = int(header.removeprefix("X-Pid: "))
            lines = [file.readline()]
            self.started.set()
            with contextlib.suppress(OSError):  # the frontend died
                lines += file.readlines()
            self.lines = [line.strip() for line in lines]

    def end(self):
        """The last line: finish reason and error text."""
        self.join(TIMEOUT_S)
        ends = [line for line in self.lines if not line.isdigit()]
        assert len(ends) == 1
        assert self.lines[-1] == ends[0]
        return ends[0]

    def tokens(self):
        return [int(line) for line in self.lines if line.isdigit()]

    def assert_complete(self):
        assert self.end() == "length"
        assert self.tokens() == [expected_token(PROMPT_LENGTH + i) for i in range(self.num_tokens)]


@pytest.fixture
def launch(tmp_path):
    launches = []

    def start(*args, **settings):
        launches.append(Launch(tmp_path, *args, **settings))
        return launches[-1]

    yield start
    for running in launches:
        running.process.kill()
        running.process.communicate()
        wait_gone(running.pids)


def test_drain_finishes_what_runs_refuses_what_is_new_and_exits_0(launch):
    server = launch(frontends=1).wait_ready()
    stream = server.stream(120)
    server.process.terminate()
    deadline = time.monotonic() + TIMEOUT_S
    while server.get("/ready")[0] != 503:
        assert time.monotonic() < deadline
    assert server.get("/generate/5")[0] == 503
    stream.assert_complete()
    assert server.wait_code() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_aborts_the_rest_and_exits_0(launch, number):
    server = launch().wait_ready()
    streams = [server.stream(4000) for _ in range(3)]
    os.killpg(server.process.pid, number)  # as the terminal does for Ctrl-C: to the whole process group
    time.sleep(0.3)
    assert all(stream.is_alive() for stream in streams)
    os.killpg(server.process.pid, number)
    assert [stream.end() for stream in streams] == ["abort"] * 3
    assert server.wait_code() == 0


def test_the_drain_timeout_aborts_the_rest_and_exits_0(launch):
    server = launch(drain_timeout_s=0.3).wait_ready()
    stream = server.stream(4000)
    server.process.terminate()
    assert stream.end() == "abort"
    assert server.wait_code() == 0


def test_a_signal_before_anything_is_ready_exits_0(launch):
    server = launch()
    deadline = time.monotonic() + TIMEOUT_S
    while not psutil.Process(server.process.pid).children():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.note_children()
    server.process.terminate()
    assert server.wait_code() == 0


def test_a_killed_engine_answers_every_stream_and_is_started_again(launch):
    server = launch(frontends=2).wait_ready()
    streams = [server.stream(4000) for _ in range(6)]
    first = server.child("engine.process")
    os.kill(first, signal.SIGKILL)
    assert [stream.end() for stream in streams] == ["error engine died"] * 6
    server.wait_child("engine.process", first)
    for _ in range(3):
        server.wait_http_ready()
    assert "killed by SIGKILL" in server.log()
    server.process.terminate()
    assert server.wait_code() == 0


def test_a_stuck_engine_is_killed_and_started_again(launch):
    server = launch(stuck_restart_s=1).wait_ready()
    streams = [server.stream(4000) for _ in range(2)]
    first = server.child("engine.process")
    os.kill(first, signal.SIGSTOP)
    assert [stream.end() for stream in streams] == ["error engine died"] * 2
    server.wait_child("engine.process", first)
    server.wait_http_ready()
    stream = server.stream(5)
    stream.assert_complete()
    assert "has not answered for" in server.log()
    server.process.terminate()
    assert server.wait_code() == 0


def test_an_engine_may_stay_stuck_when_restarts_are_off(launch):
    server = launch(stuck_restart_s=0).wait_ready()
    engine = server.child("engine.process")
    os.kill(engine, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(engine, signal.SIGCONT)
    server.stream(5).assert_complete()
    assert server.child("engine.process") == engine


def test_an_engine_that_dies_again_and_again_ends_the_launcher(launch):
    server = launch().wait_ready()
    for count in range(1, supervisor.ENGINE_RESTARTS[0] + 2):
        deadline = time.monotonic() + TIMEOUT_S
        while server.log().count("the engine is ready") < count:
            assert time.monotonic() < deadline, server.log()
            time.sleep(0.02)
        os.kill(server.child("engine.process"), signal.SIGKILL)
    assert server.wait_code() == 1
    assert "too often" in server.log()


def test_a_killed_frontend_loses_only_its_own_streams_and_is_started_again(launch):
    server = launch(frontends=2).wait_ready()
    streams = []
    while len({stream.frontend for stream in streams}) < 2:
        streams.append(server.stream(100))
        assert len(streams) < 50
    victim = streams[-1].frontend
    os.kill(victim, signal.SIGKILL)
    for stream in streams:
        stream.join(TIMEOUT_S)
        if stream.frontend == victim:
            assert all(line.isdigit() or not line for line in stream.lines)  # cut off
        else:
            stream.assert_complete()
    deadline = time.monotonic() + TIMEOUT_S
    while not (fresh := {int(server.get("/pid")[1]) for _ in range(10)} - {stream.frontend for stream in streams}):
        assert time.monotonic() < deadline
    assert len(fresh) == 1
    server.note_children()
    server.process.terminate()
    assert server.wait_code() == 0


def test_connections_wait_while_the_only_frontend_restarts(launch):
    server = launch().wait_ready()
    first = server.child("fake_frontend")
    os.kill(first, signal.SIGKILL)
    status, pid = server.get("/pid")  # connects at once, is answered by the next process
    assert status == 200
    assert int(pid) != first
    server.process.terminate()
    server.note_children()
    assert server.wait_code() == 0


def test_nothing_outlives_a_killed_launcher(launch):
    server = launch(frontends=3).wait_ready()
    assert len(server.pids) == 4
    server.process.kill()
    wait_gone(server.pids)


@pytest.mark.parametrize(("builder", "code"), [("build_failing", 2), ("build_crashing", 1)])
def test_an_engine_that_fails_at_start_up_ends_the_launcher_with_its_code(launch, builder, code):
    server = launch(builder)
    assert server.wait_code() == code
    assert "failed to start" in server.log()
    assert server.process.stdout.read() == ""


def test_a_frontend_that_refuses_its_configuration_ends_the_launcher_with_2(launch):
    assert launch(served_model_name=EXIT_AT_START).wait_code() == 2


def test_an_address_in_use_is_one_clear_error():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1 port {port}.*in use.*--port"):
            bind("127.0.0.1", port)


def test_a_host_that_does_not_exist_is_one_clear_error():
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid"):
        bind("no.such.host.invalid", 0)


def test_restarts_are_counted_within_a_period(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    restarts = Restarts(2, 10.0)
    assert restarts.allow()
    assert restarts.allow()
    assert not restarts.allow()
    now = 11.0
    assert restarts.allow()
