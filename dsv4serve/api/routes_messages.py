"""Anthropic's Messages API over the chat path: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from dsv4serve.api.blocks import Block, Blocks, Step, What
from dsv4serve.api.body import read_body
from dsv4serve.api.errors import anthropic_body, error_body, json_response
from dsv4serve.api.frontend import Frontend
from dsv4serve.api.generation import Choice, Event
from dsv4serve.api.messages_prompt import CountBody, MessagesBody, chat_body
from dsv4serve.api.routes_chat import chat_call, chat_ids
from dsv4serve.api.streaming import Answer
from dsv4serve.chat.reply import Reply
from dsv4serve.chat.tools import arguments_object
from dsv4serve.types import EngineUnavailable

router = APIRouter()
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesAnswer(Answer):
    """One message of blocks."""

    def message(self, replies: list[Reply]) -> dict[str, Any]:
        """The whole message."""
        (reply,) = replies
        content = [self._block("reasoning", reply.reasoning)] if reply.reasoning else []
        content += [self._block("text", reply.content)] if reply.content else []
        for call in reply.tool_calls:
            function = call["function"]
            block = {"type": "tool_use", "id": call["id"], "name": function["name"]}
            content.append(block | {"input": arguments_object(function["arguments"])})
        return self._head() | {"content": content} | self._end() | {"usage": self._usage()}

    async def chunks(self, first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
        """message_start, the blocks, message_delta with the end, message_stop; or an error event."""
        blocks = Blocks()
        try:
            start = self._head() | {"content": [], "stop_reason": None, "stop_sequence": None}
            start["usage"] = self._usage() | {"output_tokens": 0}
            yield _event("message_start", message=start) + _event("ping") + self._steps(blocks.feed(first.delta))
            async for event in events:
                if data := self._steps(blocks.feed(event.delta)):
                    yield data
            yield self._steps(blocks.close()) + self._closing()
        except Exception as error:
            body = anthropic_body(error_body(error))
            yield _event("error", **{key: value for key, value in body.items() if key != "type"})

    def _closing(self) -> bytes:
        return _event("message_delta", delta=self._end(), usage=self._usage()) + _event("message_stop")

    def _head(self) -> dict[str, Any]:
        call = self._call
        return {"id": call.response_id, "type": "message", "role": "assistant", "model": call.model}

    def _end(self) -> dict[str, Any]:
        choice: Choice = self._call.choices[0]
        if choice.finish_reason not in STOP_REASONS:  # this API has no word for it
            raise EngineUnavailable("the request was aborted")
        is_string = isinstance(choice.stop_reason, str)
        reason = "stop_sequence" if is_string else STOP_REASONS[str(choice.finish_reason)]
        return {"stop_reason": reason, "stop_sequence": choice.stop_reason if is_string else None}

    def _usage(self) -> dict[str, int]:
        usage = self._call.usage()
        cached = usage["prompt_cache_hit_tokens"]
        return {
            "input_tokens": usage["prompt_cache_miss_tokens"],
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }

    def _block(self, kind: str, text: str) -> dict[str, Any]:
        if kind == "text":
            return {"type": "text", "text": text}
        return {"type": "thinking", "thinking": text, "signature": self._call.response_id if text else ""}

    def _steps(self, steps: Iterator[Step]) -> bytes:
        return b"".join(map(self._step, steps))

    def _step(self, step: Step) -> bytes:
        block = step.block
        if step.what is What.OPEN:
            return _event("content_block_start", index=block.index, content_block=self._opened(block))
        if step.what is What.ADD:
            kind, name = {
                "reasoning": ("thinking_delta", "thinking"),
                "text": ("text_delta", "text"),
                "call": ("input_json_delta", "partial_json"),
            }[block.kind]
            return _event("content_block_delta", index=block.index, delta={"type": kind, name: step.text})
        stop = _event("content_block_stop", index=block.index)
        if block.kind == "reasoning":  # clients send the signature back; it is not looked at
            signature = {"type": "signature_delta", "signature": self._call.response_id}
            return _event("content_block_delta", index=block.index, delta=signature) + stop
        return stop

    def _opened(self, block: Block) -> dict[str, Any]:
        if block.call is not None:
            return {"type": "tool_use", "id": block.call.id, "name": block.call.name, "input": {}}
        return self._block(block.kind, "")


@router.post("/v1/messages")
async def messages(http: Request) -> Response:
    """Messages in, the assistant's next one out, whole or as events."""
    frontend: Frontend = http.app.state.frontend
    body = await read_body(http, MessagesBody, frontend.config.max_body_bytes)
    chat = await frontend.in_thread(lambda: chat_body(body))
    call = await chat_call(frontend, chat, "msg_", http.headers)
    return MessagesAnswer(frontend, call, bool(body.stream))


@router.post("/v1/messages/count_tokens")
async def count_tokens(http: Request) -> Response:
    """How many tokens the prompt of these messages has."""
    frontend: Frontend = http.app.state.frontend
    body = await read_body(http, CountBody, frontend.config.max_body_bytes)
    frontend.check_model(body.model)

    def work() -> int:
        chat = chat_body(body)
        return len(chat_ids(frontend, chat.messages, chat, None)[1])

    return json_response({"input_tokens": await frontend.in_thread(work)})


def _event(name: str, **fields: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps({"type": name, **fields}) + b"\n\n"
