"""Logs: one line a record on stderr, with time (UTC), level and process."""

from __future__ import annotations

import logging
import os
import sys
import time


class LineFormatter(logging.Formatter):
    """Keeps a message on one line whatever a client put into it; a traceback follows on lines of its own."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """The record's time in UTC, to the millisecond."""
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        record.message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in record.message)
        return super().formatMessage(record)


def configure(process: str, level: str) -> None:
    """Send all logs of this process to stderr under the name `process`, from `level` (debug ... error) up."""
    handler = logging.StreamHandler(sys.stderr)
    line = f"%(asctime)s %(levelname)-7s {process}[{os.getpid()}] %(name)s: %(message)s"
    handler.setFormatter(LineFormatter(line))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
