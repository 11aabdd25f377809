"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from dsv4serve.api.body import read_body
from dsv4serve.api.frontend import Frontend
from dsv4serve.api.generation import Choice, Event, build_call
from dsv4serve.api.schemas import ChatBody, ChatSwitches, TemplateKwargs
from dsv4serve.api.streaming import Generated
from dsv4serve.chat.messages import parse_messages
from dsv4serve.chat.render import render, resolve_thinking

router = APIRouter()


class ChatShape:
    """Choices with messages. Reasoning goes out under both names that clients read."""

    name, chunk_name = "chat.completion", "chat.completion.chunk"

    def opening(self, choice: Choice) -> dict[str, Any]:
        """The role chunk."""
        return _chunk(choice, {"role": "assistant", "content": ""})

    def pieces(self, event: Event) -> list[dict[str, Any]]:
        """At most one chunk of reasoning, then one of content."""
        delta, parts = event.delta, []
        if delta.reasoning:
            parts.append(_chunk(event.choice, {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}))
        if delta.content:
            parts.append(_chunk(event.choice, {"content": delta.content}))
        return parts

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The finish chunk."""
        return _chunk(choice, {}) | _end(choice)

    def whole(self, choice: Choice, reasoning: str, content: str) -> dict[str, Any]:
        """The message."""
        message = {"role": "assistant", "content": content, "reasoning_content": reasoning or None}
        if reasoning:
            message["reasoning"] = reasoning
        return {"index": choice.index, "message": message, "logprobs": None} | _end(choice)


@router.post("/v1/chat/completions")
async def chat_completions(http: Request) -> Response:
    """Messages in, the assistant's next turn out, whole or as server-sent events."""
    frontend: Frontend = http.app.state.frontend
    body = await read_body(http, ChatBody, frontend.config.max_body_bytes)
    frontend.check_model(body.model)
    info = frontend.ready_info()
    ids, thinking = await chat_ids(frontend, body.messages, body, info.max_model_len)
    limit = body.max_completion_tokens or body.max_tokens
    call = build_call(frontend, info, body, [ids], limit, prefix="chatcmpl", in_reasoning=thinking)
    return Generated(frontend, call, ChatShape(), bool(body.stream), body.wants_usage_chunk)


async def chat_ids(
    frontend: Frontend, messages: Sequence[Any], switches: ChatSwitches, limit: int | None
) -> tuple[list[int], bool]:
    """Prompt ids of `messages` and whether the model is to think.

    Raises InvalidRequest for wrong messages, and without tokenising for texts that cannot fit `limit` tokens.
    """
    kwargs = switches.chat_template_kwargs or TemplateKwargs()
    thinking = resolve_thinking(
        None if switches.thinking is None else switches.thinking.type,
        kwargs.thinking,
        kwargs.enable_thinking,
        switches.reasoning_effort,
    )

    def work() -> list[int]:
        segments = render(parse_messages(messages), thinking, drop_thinking=kwargs.drop_thinking is not False)
        if limit is not None:
            frontend.check_length(frontend.tokenizer.min_tokens("".join(segments)), limit, at_least=True)
        return frontend.tokenizer.encode_segments(segments)

    return await frontend.in_thread(work), thinking


def _chunk(choice: Choice, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}


def _end(choice: Choice) -> dict[str, Any]:
    return {
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "matched_stop": choice.matched_stop,
    }
