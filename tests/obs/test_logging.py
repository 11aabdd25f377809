import json
import logging
import os
import re
import subprocess
import sys

import pytest

from dsv4serve.obs.logging import configure, request_id


def test_one_line_a_record_with_time_level_and_process(capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    configure("engine", "info")
    logging.getLogger("some.part").info("prompt %s", "a\nfake line\x1b[31m")
    logging.getLogger("some.part").debug("not at this level")
    (line,) = capsys.readouterr().err.splitlines()
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.match(rf"{time} INFO    engine\[{os.getpid()}\] some\.part: prompt a\\nfake line\\x1b\[31m$", line)


@pytest.fixture
def log_to(monkeypatch):
    """Sets the logs of this process up as `configure` does, for one test."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    token = request_id.set("")
    yield configure
    request_id.reset(token)


def test_json_is_one_object_a_line(log_to, capsys):
    log_to("frontend", "info", "json")
    logger = logging.getLogger("some.part")
    logger.info("prompt %s", "a\nfake line", extra={"fields": {"output_tokens": 3}})
    request_id.set("mine")
    try:
        raise ValueError("odd")
    except ValueError:
        logger.exception("it failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "info",
        "process": "frontend",
        "pid": os.getpid(),
        "logger": "some.part",
        "message": "prompt a\nfake line",
        "output_tokens": 3,
    }
    assert (second["request_id"], second["level"], second["message"]) == ("mine", "error", "it failed")
    assert second["exception"].endswith("ValueError: odd")


def test_a_line_of_text_has_the_request_it_belongs_to(log_to, capsys):
    log_to("frontend", "info")
    request_id.set("mine\n")
    logging.getLogger("some.part").info("failed")
    assert capsys.readouterr().err.endswith(r" some.part: [mine\n] failed" + "\n")


def test_nobody_waits_for_a_reader_of_stderr_and_what_it_missed_is_said():
    """A pipe that is not read takes 64 KiB; the process logs more than the queue holds and is not stopped by it."""
    code = """
import logging, sys
from dsv4serve.obs.logging import MAX_LINES, configure
configure("frontend", "info", in_thread=True)
for number in range(2 * MAX_LINES):
    logging.getLogger("x").info("line %06d", number)
print("done", flush=True)
sys.stdin.readline()
logging.getLogger("x").info("the last")
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "done\n"
        lines = [process.stderr.readline()]
        while not lines[-1].endswith("line 009000\n"):
            lines.append(process.stderr.readline())
        process.stdin.write("\n")
        process.stdin.flush()
        lines += process.stderr.readlines()
    numbers = [int(line[-7:]) for line in lines if " x: line " in line]
    assert numbers == sorted(set(numbers))
    assert 10_000 <= len(numbers) < 20_000
    lost = 20_000 - len(numbers)
    assert f"{lost} lines of this log were lost" in lines[-2]
    assert lines[-1].endswith(" x: the last\n")
