"""Logs: one line a record on stderr, with time (UTC), level, process and, where there is one, the request's id."""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import sys
import time
from contextvars import ContextVar
from logging.handlers import QueueHandler, QueueListener

MAX_LINES = 10_000  # that wait for a slow reader of stderr

# The id, as the client knows it, of the request that is being answered.
request_id: ContextVar[str] = ContextVar("request_id", default="")


class LineFormatter(logging.Formatter):
    """Keeps a message on one line whatever a client put into it; a traceback follows on lines of its own."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """The record's time in UTC, to the millisecond."""
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        request = request_id.get()
        message = f"[{request}] {record.message}" if request else record.message
        record.message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        return super().formatMessage(record)


class JsonFormatter(LineFormatter):
    """A JSON object a record: time, level, process, pid, logger, message; request_id and exception where there is one;
    and what the record has as `fields`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := request_id.get():
            line["request_id"] = request
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({**line, **getattr(record, "fields", {})}, default=str)


class LineQueue(QueueHandler):
    """Formats a record where it is made, which knows the request; a thread writes the line. Lines beyond MAX_LINES are
    counted and lost, because nobody may wait for whoever reads the log."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self._lines: queue.Queue[logging.LogRecord] = queue.Queue(MAX_LINES)
        super().__init__(self._lines)
        self.setFormatter(formatter)
        self._num_lost = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Leave a formatted record to the thread."""
        if self._num_lost and self._lines.qsize() < MAX_LINES // 2:
            lost, self._num_lost = self._num_lost, 0
            logging.getLogger(__name__).warning("%d lines of this log were lost: stderr was not read", lost)
        try:
            self._lines.put_nowait(record)
        except queue.Full:
            self._num_lost += 1


class LineWriter(QueueListener):
    """The thread; a full queue is written out before it ends."""

    def enqueue_sentinel(self) -> None:
        """Ask the thread to end."""
        self.queue.put(self._sentinel)  # type: ignore[attr-defined]


def configure(process: str, level: str, form: str = "text", in_thread: bool = False) -> None:
    """Send this process's logs to stderr under the name `process`, from `level` (debug ... error) up.

    `form` is text or json. With `in_thread` a slow reader of stderr holds up a thread and not the caller.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    line = f"%(asctime)s %(levelname)-7s {process}[{os.getpid()}] %(name)s: %(message)s"
    formatter = JsonFormatter(process) if form == "json" else LineFormatter(line)
    if in_thread:
        writer, handler = handler, LineQueue(formatter)
        lines = LineWriter(handler.queue, writer)
        lines.start()
        atexit.register(lines.stop)
    else:
        handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
