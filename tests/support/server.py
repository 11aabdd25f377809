"""The real server as a child process: `dsv4serve launch` on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

START_TIMEOUT_S = 60.0


@dataclass
class Server:
    """A running launcher and where it answers."""

    process: subprocess.Popen[str]
    url: str
    log: list[str] = field(default_factory=list)

    def children(self, module: str) -> list[psutil.Process]:
        """Child processes that run `module`."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if module in child.cmdline():
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, then the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextmanager
def serve(*flags: str) -> Iterator[Server]:
    """Launch with `flags`; yields once the server says it is ready; kills what is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv4serve.cli.main", "launch", "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    server = Server(process, "")
    stderr = process.stderr
    threading.Thread(target=lambda: server.log.extend(stderr), daemon=True).start()
    try:
        watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
        watchdog.start()
        for line in process.stdout:
            match = re.search(r"ready on (http://\S+)", line)
            if match:
                server.url = match[1]
                break
        watchdog.cancel()
        assert server.url, f"the server did not start: {''.join(server.log)}"
        threading.Thread(target=lambda: list(process.stdout or ()), daemon=True).start()
        yield server
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Poll a callable until it returns something true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
