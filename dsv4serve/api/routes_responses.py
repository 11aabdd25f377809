"""OpenAI's Responses API over the chat path, without state: POST /v1/responses."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from dsv4serve.api.blocks import Block, Blocks, Step, What
from dsv4serve.api.body import read_body
from dsv4serve.api.errors import error_body
from dsv4serve.api.frontend import Frontend
from dsv4serve.api.generation import Call, Event
from dsv4serve.api.responses_prompt import ResponsesBody, chat_body
from dsv4serve.api.routes_chat import chat_call
from dsv4serve.api.streaming import Answer
from dsv4serve.chat.reply import Delta, Reply

router = APIRouter()
STATUS = {"length": "incomplete", "abort": "cancelled"}  # by finish_reason; else completed
LAST_EVENT = {"completed": "response.completed", "incomplete": "response.incomplete", "cancelled": "response.failed"}


class ResponsesAnswer(Answer):
    """A response of items: reasoning, message, function calls."""

    def __init__(self, frontend: Frontend, call: Call, body: ResponsesBody) -> None:
        super().__init__(frontend, call, bool(body.stream))
        self._body, self._blocks = body, Blocks()
        self._ids: list[str] = []  # of the items
        self._num_events = 0

    def message(self, replies: list[Reply]) -> dict[str, Any]:
        """The response."""
        blocks = self._blocks
        (reply,) = replies
        list(blocks.feed(reply.as_delta()))
        return self._response(self._status)

    async def chunks(self, first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
        """The response's start, its items piece by piece, its end."""
        try:
            yield (
                self._event("response.created", response=self._response("in_progress"))
                + self._event("response.in_progress", response=self._response("in_progress"))
                + self._deltas(first.delta)
            )
            async for event in events:
                if data := self._deltas(event.delta):
                    yield data
            yield b"".join(map(self._step, self._blocks.close()))
            yield self._event(LAST_EVENT[self._status], response=self._response(self._status))
        except Exception as error:
            body = error_body(error)["error"]
            failure = {"code": "server_error", "message": body["message"]}
            yield self._event("response.failed", response=self._response("failed") | {"error": failure})

    @property
    def _status(self) -> str:
        return STATUS.get(str(self._call.choices[0].finish_reason), "completed")

    def _response(self, status: str) -> dict[str, Any]:
        call, body = self._call, self._body
        has_ended = status != "in_progress"
        return {
            "id": call.response_id,
            "object": "response",
            "created_at": call.created,
            "status": status,
            "model": call.model,
            "output": [self._item(block, status) for block in self._blocks.blocks] if has_ended else [],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "store": False,
            "temperature": call.choices[0].request.sampling.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": call.choices[0].request.sampling.top_p,
            "truncation": "disabled",
            "usage": self._usage() if has_ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._call.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": usage["prompt_cache_hit_tokens"]},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }

    def _item(self, block: Block, status: str, with_text: bool = True) -> dict[str, Any]:
        if block.index == len(self._ids):
            prefix = {"reasoning": "rs_", "text": "msg_", "call": "fc_"}[block.kind]
            self._ids.append(prefix + secrets.token_hex(12))
        item_id, text = self._ids[block.index], block.text if with_text else ""
        if block.kind == "reasoning":
            return {"id": item_id, "type": "reasoning", "summary": [], "content": [_part(block, text)][:with_text]}
        # Only what was being written when the end came is incomplete.
        is_cut = block is self._blocks.blocks[-1] and status in ("incomplete", "cancelled", "failed")
        item = {"id": item_id, "status": "incomplete" if is_cut else "completed" if with_text else "in_progress"}
        if block.call is not None:
            called = {"call_id": block.call.id, "name": block.call.name, "arguments": text}
            return item | {"type": "function_call"} | called
        return item | {"type": "message", "role": "assistant", "content": [_part(block, text)][:with_text]}

    def _deltas(self, delta: Delta) -> bytes:
        return b"".join(map(self._step, self._blocks.feed(delta)))

    def _step(self, step: Step) -> bytes:
        block = step.block
        if step.what is What.OPEN:
            item = self._item(block, "in_progress", with_text=False)
            opened = self._event("response.output_item.added", output_index=block.index, item=item)
            return opened + self._content(block, "added", "")
        where = {"item_id": self._ids[block.index], "output_index": block.index}
        if block.kind == "call":
            name, field = "response.function_call_arguments", "arguments"
        else:
            name, field = f"response.{'output' if block.kind == 'text' else 'reasoning'}_text", "text"
            where["content_index"] = 0
        logprobs: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        if step.what is What.ADD:
            return self._event(f"{name}.delta", **where, delta=step.text, **logprobs)
        called = {"name": block.call.name} if block.call is not None else {}
        done = self._event(f"{name}.done", **where, **{field: block.text}, **called, **logprobs)
        done += self._content(block, "done", block.text)
        item = self._item(block, self._status if self._call.choices[0].finish_reason else "completed")
        return done + self._event("response.output_item.done", output_index=block.index, item=item)

    def _content(self, block: Block, what: str, text: str) -> bytes:
        if block.kind == "call":
            return b""
        where = {"item_id": self._ids[block.index], "output_index": block.index, "content_index": 0}
        return self._event(f"response.content_part.{what}", **where, part=_part(block, text))

    def _event(self, name: str, /, **fields: Any) -> bytes:
        event = {"type": name, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"


@router.post("/v1/responses")
async def responses(http: Request) -> Response:
    """Input in, a response's items out, whole or as events."""
    frontend: Frontend = http.app.state.frontend
    body = await read_body(http, ResponsesBody, frontend.config.max_body_bytes)
    chat = await frontend.in_thread(lambda: chat_body(body))
    call = await chat_call(frontend, chat, "resp_", http.headers)
    return ResponsesAnswer(frontend, call, body)


def _part(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
