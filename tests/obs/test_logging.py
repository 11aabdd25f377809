import logging
import os
import re

from dsv4serve.obs.logging import configure


def test_one_line_a_record_with_time_level_and_process(capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    configure("engine", "info")
    logging.getLogger("some.part").info("prompt %s", "a\nfake line\x1b[31m")
    logging.getLogger("some.part").debug("not at this level")
    (line,) = capsys.readouterr().err.splitlines()
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.match(rf"{time} INFO    engine\[{os.getpid()}\] some\.part: prompt a\\nfake line\\x1b\[31m$", line)
