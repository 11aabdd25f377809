"""The answer to a call that generates: one JSON body, or server-sent events while the tokens come.

Nothing is sent before the engine's first output, so a request that it rejects gets a real HTTP status. A client that
goes away cancels the work, which closes the engine's streams and so aborts the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, aclosing
from typing import Any, Protocol

import orjson
from fastapi import Response
from starlette.types import Message, Receive, Scope, Send

from dsv4serve.api.errors import error_body, json_response
from dsv4serve.api.frontend import Frontend
from dsv4serve.api.generation import Call, Choice, Event, end_after, run
from dsv4serve.api.schemas import StreamOptions
from dsv4serve.chat.reply import Reply

LARGE_TOKENS = 500  # what is said about more tokens than that is put together off the event loop
DONE = b"data: [DONE]\n\n"


class Shape(Protocol):
    """How a call's choices look on the wire: chat or completions."""

    name: str  # `object` of the whole answer
    chunk_name: str  # `object` of a chunk

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The choice part of the first chunk, before any text."""

    def pieces(self, event: Event) -> list[dict[str, Any]]:
        """The choice parts of the chunks that carry an event's text."""

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The choice part of the chunk with the finish_reason."""

    def whole(self, choice: Choice, reply: Reply) -> dict[str, Any]:
        """The choice part of an answer that is not streamed."""


class Answer(Response):
    """Runs a call and sends what it gives: `message` at once, or `chunks` and then `end`."""

    end = b""

    def __init__(self, frontend: Frontend, call: Call, stream: bool) -> None:
        super().__init__()
        self._frontend, self._call, self._stream = frontend, call, stream
        self._claim = ExitStack()  # of the call's id

    def message(self, replies: list[Reply]) -> dict[str, Any]:
        """The JSON of an answer that is not streamed; one reply per choice."""
        raise NotImplementedError

    def chunks(self, first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
        """Server-sent events. A failure is one of them, because the status is sent already."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI answer. Raises, before anything is sent, what the engine answered instead of a first output."""
        with self._claim:
            self._claim.enter_context(self._frontend.open_call(self._call.request_id))
            await self._run(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = asyncio.create_task(end_after(self._frontend, self._call))
        work = asyncio.create_task(self._streamed(send) if self._stream else self._whole(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        finally:
            for task in (work, gone, deadline):
                task.cancel()
            await asyncio.gather(work, gone, deadline, return_exceptions=True)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._call
        replies = [Reply() for _ in call.choices]
        async with aclosing(self._events()) as events:
            async for event in events:
                replies[event.choice.index].add(event.delta)

        def answer() -> Response:
            return json_response(self.message(replies), headers=id_headers(call.request_id))

        is_large = sum(len(choice.tokens) for choice in call.choices) > LARGE_TOKENS
        response = await self._frontend.in_thread(answer) if is_large else answer()
        await response(scope, receive, send)

    async def _events(self) -> AsyncGenerator[Event, None]:
        """The call's events. A client that has seen the end, or a failure, may use the id again at once."""
        num_open = len(self._call.choices)
        try:
            async with aclosing(run(self._frontend, self._call)) as events:
                async for event in events:
                    num_open -= event.is_last
                    if not num_open:
                        self._claim.close()
                    yield event
        finally:
            self._claim.close()

    async def _streamed(self, send: Send) -> None:
        async with aclosing(self._events()) as events:
            first = await anext(events)
            await send(_start(self._call))
            async with aclosing(self.chunks(first, events)) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": self.end, "more_body": False})


class Generated(Answer):
    """The answer in OpenAI's shape of choices."""

    end = DONE

    def __init__(
        self, frontend: Frontend, call: Call, shape: Shape, stream: bool, options: StreamOptions | None
    ) -> None:
        super().__init__(frontend, call, stream)
        self._shape = shape
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_in_chunks = bool(options and options.continuous_usage_stats)

    def message(self, replies: list[Reply]) -> dict[str, Any]:
        """See Answer."""
        choices = [self._shape.whole(choice, reply) for choice, reply in zip(self._call.choices, replies, strict=True)]
        return {**_head(self._call, self._shape.name), "choices": choices, "usage": self._call.usage()}

    async def chunks(self, first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
        """See Answer."""
        call, shape = self._call, self._shape
        head = orjson.dumps(_head(call, shape.chunk_name))[:-1]
        # With include_usage OpenAI puts "usage": null on every other chunk.
        tail = b'],"usage":null}\n\n' if self._usage_at_end else b"]}\n\n"

        def chunk(part: Mapping[str, Any]) -> bytes:
            end = b'],"usage":' + orjson.dumps(call.usage()) + b"}\n\n" if self._usage_in_chunks else tail
            return b"data: " + head + b',"choices":[' + orjson.dumps(part) + end

        try:
            opening = b"".join(chunk(part) for choice in call.choices if (part := shape.opening(choice)) is not None)
            yield opening + b"".join(map(chunk, self._parts(first)))
            async for event in events:
                if data := b"".join(map(chunk, self._parts(event))):
                    yield data
            if self._usage_at_end:
                usage = orjson.dumps(call.usage())
                yield b"data: " + head + b',"choices":[],"usage":' + usage + b"}\n\n"
        except Exception as error:  # the status is sent already: the stream itself has to say it
            yield b"data: " + orjson.dumps(error_body(error)) + b"\n\n"

    def _parts(self, event: Event) -> list[dict[str, Any]]:
        parts = self._shape.pieces(event)
        return [*parts, self._shape.closing(event.choice)] if event.is_last else parts


def _head(call: Call, name: str) -> dict[str, Any]:
    return {"id": call.response_id, "object": name, "created": call.created, "model": call.model}


def _start(call: Call) -> Message:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # proxies must not collect events
        *((name.lower().encode(), value.encode()) for name, value in id_headers(call.request_id).items()),
    ]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def id_headers(request_id: str) -> dict[str, str]:
    """The call's id, under OpenAI's and under Anthropic's name."""
    return {"X-Request-Id": request_id, "Request-Id": request_id}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
