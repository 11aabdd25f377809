"""One JSON object a line in, one a line out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import orjson

from dsv4serve.types import InvalidRequest


def convert_lines(convert: Callable[[bytes], Any]) -> int:
    """Write what `convert` makes of every line of stdin that is not blank, in order.

    A line that it refuses with InvalidRequest becomes {"error": {"message", "param"}}, and the exit code 1.
    """
    code = 0
    for line in sys.stdin.buffer:
        if not line.strip():
            continue
        try:
            result = convert(line)
        except InvalidRequest as error:
            result = {"error": {"message": str(error), "param": error.param}}
            code = 1
        sys.stdout.buffer.write(orjson.dumps(result) + b"\n")
    sys.stdout.buffer.flush()
    return code
