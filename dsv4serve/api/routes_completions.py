"""POST /v1/completions: raw text or ids in, raw text out. Nothing is parsed and no BOS is added unless asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from dsv4serve.api.body import read_body
from dsv4serve.api.constraints import body_constraint, client_grammars
from dsv4serve.api.frontend import Frontend
from dsv4serve.api.generation import Call, Choice, Event, build_call
from dsv4serve.api.logprobs import CompletionLogprobs, Token
from dsv4serve.api.schemas import MAX_PROMPTS, CompletionBody
from dsv4serve.api.streaming import Generated
from dsv4serve.chat.reply import Reply
from dsv4serve.chat.tokenizer import ChatTokenizer, ControlToken
from dsv4serve.engine.messages import EngineInfo
from dsv4serve.types import InvalidRequest

router = APIRouter()
DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionShape:
    """Choices with text. Every engine output gives a chunk, so chunks tell when tokens came."""

    name = chunk_name = "text_completion"

    def __init__(self, tokenizer: ChatTokenizer, body: CompletionBody) -> None:
        self._tokenizer, self._body = tokenizer, body
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by choice

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """Completions have no role chunk."""
        if not self._body.return_token_ids:
            return None
        return _chunk(choice, "") | {"prompt_token_ids": choice.request.prompt_ids}

    def pieces(self, event: Event) -> list[dict[str, Any]]:
        """One chunk; the last text goes with the finish_reason."""
        if event.is_last and not event.delta.content and not event.tokens:
            return []
        return [_chunk(event.choice, event.delta.content) | self._about(event.choice, event.tokens)]

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The finish chunk."""
        return _chunk(choice, "") | _end(choice)

    def whole(self, choice: Choice, reply: Reply) -> dict[str, Any]:
        """The text."""
        about = self._about(choice, choice.tokens)
        if self._body.return_token_ids:
            about["prompt_token_ids"] = choice.request.prompt_ids
        return _chunk(choice, reply.content) | about | _end(choice)

    def _about(self, choice: Choice, tokens: list[Token]) -> dict[str, Any]:
        """The fields that describe tokens, as far as they were asked for."""
        about: dict[str, Any] = {}
        if self._body.logprobs is not None:
            if choice.index not in self._logprobs:
                skip_special_tokens = self._body.skip_special_tokens is not False
                self._logprobs[choice.index] = CompletionLogprobs(self._tokenizer, skip_special_tokens)
            about["logprobs"] = self._logprobs[choice.index].take(tokens)
        if self._body.return_token_ids:
            about["token_ids"] = [token.id for token in tokens if not token.is_prompt]
        return about


@router.post("/v1/completions")
async def completions(http: Request) -> Response:
    """One or several prompts in, their continuations out, whole or as server-sent events."""
    frontend: Frontend = http.app.state.frontend
    body = await read_body(http, CompletionBody, frontend.config.max_body_bytes)
    call = await completion_call(frontend, body, "cmpl-", http.headers)
    shape = CompletionShape(frontend.tokenizer, body)
    return Generated(frontend, call, shape, bool(body.stream), body.stream_options)


async def completion_call(frontend: Frontend, body: CompletionBody, prefix: str, headers: Mapping[str, str]) -> Call:
    """The call that answers `body`, whose response id starts with `prefix`. Raises InvalidRequest."""
    frontend.check_model(body.model)
    info = frontend.ready_info()
    prompts, constraint, fields = await frontend.in_thread(
        lambda: (_prompts(frontend, info, body), body_constraint(body), client_grammars(body))
    )
    if len(prompts) * (body.n or 1) > MAX_PROMPTS:
        raise InvalidRequest(f"{len(prompts)} prompts x n {body.n} is above {MAX_PROMPTS} choices", "n")
    limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if constraint is not None:
        await frontend.grammar_check.check(constraint, info.vocab_size, fields)
    return build_call(
        *(frontend, info, body, prompts, limit), prefix=prefix, start=None, headers=headers, constraint=constraint
    )


def _prompts(frontend: Frontend, info: EngineInfo, body: CompletionBody) -> list[list[int]]:
    """The prompts of a body, each with the suffix around its gap if there is one."""
    prompts = prompt_ids(frontend, info, body.prompt, bool(body.add_special_tokens) and not body.suffix)
    if not body.suffix:
        return prompts
    frontend.check_length(frontend.tokenizer.min_tokens(body.suffix), info.max_model_len, at_least=True)
    suffix, control_ids = frontend.tokenizer.encode(body.suffix), frontend.tokenizer.control_ids
    bos = [control_ids[ControlToken.BOS]] if body.add_special_tokens else []
    head, tail = [*bos, control_ids[ControlToken.FIM_BEGIN]], [*suffix, control_ids[ControlToken.FIM_END]]
    return [[*head, *prompt, control_ids[ControlToken.FIM_HOLE], *tail] for prompt in prompts]


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


def _end(choice: Choice) -> dict[str, Any]:
    return {
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "matched_stop": choice.matched_stop,
    }
