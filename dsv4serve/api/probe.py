"""Whether the model generates: one request of one token."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING

from dsv4serve.types import EngineUnavailable, FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from dsv4serve.api.frontend import Engine

WAIT_S = 8.0  # for the token, through which a long step of others is no failure
STATS_WAIT_S = 1.0
FIRST = -(2**31)  # the priority of the request: in front of all others
PROMPT = [0]  # BOS


class Probe:
    """One attempt at a time, whose result all get who ask meanwhile: anybody may ask, without a key."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._attempt: asyncio.Task[bool] | None = None

    async def works(self) -> bool:
        """Whether the attempt gave a token, or others got theirs while it waited for a slot."""
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.create_task(self._try())
        return await asyncio.shield(self._attempt)

    async def _try(self) -> bool:
        try:
            before = await self._num_generated()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    if await self._generates():
                        return True
            return await self._num_generated() > before
        except (EngineUnavailable, TimeoutError):
            return False

    async def _num_generated(self) -> int:
        async with asyncio.timeout(STATS_WAIT_S):
            return (await self._engine.stats()).num_generated_tokens

    async def _generates(self) -> bool:
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        name = f"probe/{secrets.token_hex(8)}"
        request = Request(request_id=name, prompt_ids=PROMPT, sampling=sampling, priority=FIRST)
        outputs = [output async for output in self._engine.submit(request)]
        return bool(outputs) and outputs[-1].finish_reason is not FinishReason.ERROR
