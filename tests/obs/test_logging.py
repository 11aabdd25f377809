import json
import logging
import os
import re

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
