"""Logs: one line a record on stderr, with time (UTC), level, process and, where there is one, the request's id."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextvars import ContextVar

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


def configure(process: str, level: str, form: str = "text") -> None:
    """Send this process's logs to stderr under the name `process`, from `level` (debug ... error) up.

    `form` is text or json.
    """
    handler = logging.StreamHandler(sys.stderr)
    line = f"%(asctime)s %(levelname)-7s {process}[{os.getpid()}] %(name)s: %(message)s"
    handler.setFormatter(JsonFormatter(process) if form == "json" else LineFormatter(line))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
