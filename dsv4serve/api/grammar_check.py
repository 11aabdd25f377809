"""Tries grammars in a process of their own before the engine sees them, because a hostile one never ends compiling."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import orjson

from dsv4serve.types import Constraint, EngineUnavailable, InvalidRequest

MODULE = "dsv4serve.constrained.worker"
MAX_KNOWN = 1024
TOO_LONG = "the grammar takes too long or too much memory to compile; make it smaller"


class GrammarCheck:
    """Remembers what it has tried: agents send the same tools with every request. The process starts with the first
    grammar, which therefore waits some seconds more.

    Args:
        directory: the model's folder, for its tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._worker: asyncio.subprocess.Process | None = None
        self._known: OrderedDict[str, str | None] = OrderedDict()
        self._lock = asyncio.Lock()

    async def check(self, constraint: Constraint, vocab_size: int, fields: Sequence[str]) -> None:
        """Raise InvalidRequest when the engine could not or should not serve `constraint`.

        fields: of the body, where the client wrote what is in it; the error names the field if there is one only.
        """
        # Shielded: a client that goes away must not leave an answer of the process behind for the next one.
        wrong = await asyncio.shield(asyncio.create_task(self._checked(constraint.text, vocab_size)))
        if wrong is not None:
            raise InvalidRequest(wrong, fields[0] if len(fields) == 1 else None)

    async def _checked(self, text: str, vocab_size: int) -> str | None:
        async with self._lock:
            if text not in self._known:
                self._known[text] = await self._try(text, vocab_size)
                if len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)
            return self._known[text]

    async def _try(self, text: str, vocab_size: int) -> str | None:
        if self._worker is None or self._worker.returncode is not None:
            self._worker = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", MODULE, str(self._directory), str(vocab_size)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            if not await self._read(self._worker):
                raise EngineUnavailable("grammars cannot be checked now; see the server's log")
        worker = self._worker
        assert worker.stdin is not None
        with contextlib.suppress(ConnectionError):
            worker.stdin.write(orjson.dumps(text) + b"\n")
            await worker.stdin.drain()
        line = await self._read(worker)
        if not line:
            await worker.wait()
            self._worker = None
            return TOO_LONG
        wrong: str | None = orjson.loads(line)
        return wrong

    @staticmethod
    async def _read(worker: asyncio.subprocess.Process) -> bytes:
        assert worker.stdout is not None
        return await worker.stdout.readline()

    def close(self) -> None:
        """End the process."""
        if self._worker is not None and self._worker.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._worker.kill()
            self._worker = None
