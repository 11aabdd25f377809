"""POST /v1/completions: raw text or ids in, raw text out. Nothing is parsed and no BOS is added unless asked for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from dsv4serve.api.body import read_body
from dsv4serve.api.frontend import Frontend
from dsv4serve.api.generation import Choice, Event, build_call
from dsv4serve.api.schemas import MAX_PROMPTS, CompletionBody
from dsv4serve.api.streaming import Generated
from dsv4serve.chat.reply import Reply
from dsv4serve.chat.tokenizer import ControlToken
from dsv4serve.engine.messages import EngineInfo
from dsv4serve.types import InvalidRequest

router = APIRouter()
DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionShape:
    """Choices with text. Every engine output gives a chunk, so chunks tell when tokens came."""

    name = chunk_name = "text_completion"

    def opening(self, choice: Choice) -> None:
        """Completions have no role chunk."""

    def pieces(self, event: Event) -> list[dict[str, Any]]:
        """One chunk; the last text goes with the finish_reason."""
        return [] if event.is_last and not event.delta.content else [_chunk(event.choice, event.delta.content)]

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The finish chunk."""
        return self.whole(choice, Reply())

    def whole(self, choice: Choice, reply: Reply) -> dict[str, Any]:
        """The text."""
        return _chunk(choice, reply.content) | {
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "matched_stop": choice.matched_stop,
        }


@router.post("/v1/completions")
async def completions(http: Request) -> Response:
    """One or several prompts in, their continuations out, whole or as server-sent events."""
    frontend: Frontend = http.app.state.frontend
    body = await read_body(http, CompletionBody, frontend.config.max_body_bytes)
    frontend.check_model(body.model)
    info = frontend.ready_info()
    prompts = await frontend.in_thread(lambda: prompt_ids(frontend, info, body.prompt, bool(body.add_special_tokens)))
    if len(prompts) * (body.n or 1) > MAX_PROMPTS:
        raise InvalidRequest(f"{len(prompts)} prompts x n {body.n} is above {MAX_PROMPTS} choices", "n")
    limit = body.max_tokens or DEFAULT_MAX_TOKENS
    call = build_call(frontend, info, body, prompts, limit, prefix="cmpl-", start=None, headers=http.headers)
    return Generated(frontend, call, CompletionShape(), bool(body.stream), body.wants_usage_chunk)


def prompt_ids(frontend: Frontend, info: EngineInfo, prompt: Any, add_bos: bool) -> list[list[int]]:
    """The prompts of a body as ids. Raises InvalidRequest naming the wrong one."""
    items: list[Any]
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_id(prompt[0])):
        items, where = [prompt], ["prompt"]
    elif isinstance(prompt, list):
        items, where = prompt, [f"prompt.{index}" for index in range(len(prompt))]
    else:
        raise InvalidRequest("expected a string, a list of strings, a list of ids or a list of lists of ids", "prompt")
    if not 0 < len(items) <= MAX_PROMPTS:
        raise InvalidRequest(f"{len(items)} prompts; allowed are 1 to {MAX_PROMPTS}", "prompt")
    head = [frontend.tokenizer.control_ids[ControlToken.BOS]] if add_bos else []
    return [head + _ids(frontend, info, item, param, bool(head)) for item, param in zip(items, where, strict=True)]


def _ids(frontend: Frontend, info: EngineInfo, item: Any, param: str, has_bos: bool) -> list[int]:
    if isinstance(item, str):
        frontend.check_length(frontend.tokenizer.min_tokens(item), info.max_model_len, at_least=True)
        ids = frontend.tokenizer.encode(item)
    elif isinstance(item, list) and all(map(_is_id, item)):
        ids = item
        for position, token_id in enumerate(ids):
            if not 0 <= token_id < info.vocab_size:
                raise InvalidRequest(
                    f"id {token_id} is outside the vocabulary (0 to {info.vocab_size - 1})", f"{param}.{position}"
                )
    else:
        raise InvalidRequest("expected a string or a list of ids", param)
    if not ids and not has_bos:
        raise InvalidRequest("the prompt is empty; it needs at least one token", param)
    return ids


def _is_id(value: Any) -> bool:
    return type(value) is int  # a boolean is an int to isinstance


def _chunk(choice: Choice, text: str) -> dict[str, Any]:
    return {"index": choice.index, "text": text, "logprobs": None, "finish_reason": None}
