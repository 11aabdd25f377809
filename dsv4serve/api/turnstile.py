"""Lets requests begin a few at a time, so that a burst of them does not hold up the streams that run."""

from __future__ import annotations

import asyncio
from collections import deque

PER_TURN = 4  # a request takes the event loop about half a millisecond until its prompt goes to a thread


class Turnstile:
    """At most PER_TURN pass in one turn of the event loop, in the order in which they came."""

    def __init__(self) -> None:
        self._left = PER_TURN
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        """Return when it is this request's turn; without a burst at once."""
        loop = asyncio.get_running_loop()
        if self._left == PER_TURN:
            loop.call_soon(self._next_turn)
        if self._left:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_turn(self) -> None:
        self._left = PER_TURN
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled: its client went away
                turn.set_result(None)
                self._left -= 1
        if self._left < PER_TURN:
            asyncio.get_running_loop().call_soon(self._next_turn)
