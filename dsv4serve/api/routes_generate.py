"""POST /generate, SGLang's own form of completions: ids or text in, ids and text out, for benchmarks and training."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from dsv4serve.api.body import read_body
from dsv4serve.api.errors import error_body
from dsv4serve.api.frontend import Frontend
from dsv4serve.api.generate_prompt import GenerateBody, completion_body, renamed
from dsv4serve.api.generation import Call, Choice, Event
from dsv4serve.api.logprobs import Token
from dsv4serve.api.routes_completions import completion_call
from dsv4serve.api.streaming import DONE, Answer
from dsv4serve.chat.reply import Reply
from dsv4serve.types import InvalidRequest

router = APIRouter()


class GenerateAnswer(Answer):
    """A result, or a list of them for several prompts or n. A chunk of a stream has all that came so far."""

    end = DONE

    def __init__(self, frontend: Frontend, call: Call, body: GenerateBody, is_list: bool) -> None:
        super().__init__(frontend, call, bool(body.stream))
        self._body, self._is_list = body, is_list
        self._begin = time.perf_counter()

    def message(self, replies: list[Reply]) -> Any:
        """See Answer."""
        results = [self._result(choice, reply) for choice, reply in zip(self._call.choices, replies, strict=True)]
        return results if self._is_list else results[0]

    async def chunks(self, first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
        """See Answer."""
        replies = [Reply() for _ in self._call.choices]

        def chunk(event: Event) -> bytes:
            choice = event.choice
            replies[choice.index].add(event.delta)
            result = self._result(choice, replies[choice.index])
            result |= {"index": choice.index} if self._is_list else {}
            return b"data: " + orjson.dumps(result) + b"\n\n"

        try:
            yield chunk(first)
            async for event in events:
                yield chunk(event)
        except Exception as error:  # the status is sent already: the stream itself has to say it
            yield b"data: " + orjson.dumps(error_body(error)) + b"\n\n"

    def _result(self, choice: Choice, reply: Reply) -> dict[str, Any]:
        output = [token for token in choice.tokens if not token.is_prompt]
        meta: dict[str, Any] = {
            "id": self._call.response_id,
            "finish_reason": _finish(choice),
            "prompt_tokens": len(choice.request.prompt_ids),
            "completion_tokens": choice.parser.num_tokens,
            "cached_tokens": choice.num_cached_tokens,
            "e2e_latency": time.perf_counter() - self._begin,
        }
        if self._body.return_logprob:
            prompt = [token for token in choice.tokens if token.is_prompt] if self._body.wants_prompt_logprobs else []
            meta |= self._logprobs("input", prompt[self._body.logprob_start_len or 0 :])
            meta |= self._logprobs("output", output)
        return {"text": reply.content, "output_ids": [token.id for token in output], "meta_info": meta}

    def _logprobs(self, side: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """Triples of log probability, id and text (null unless asked for)."""
        found: dict[str, Any] = {
            f"{side}_token_logprobs": [
                self._triple(None if token.logprobs is None else token.logprobs.logprob, token.id) for token in tokens
            ]
        }
        if self._body.top_logprobs_num:
            found[f"{side}_top_logprobs"] = [
                token.logprobs and list(map(self._triple, token.logprobs.top_logprobs, token.logprobs.top_ids))
                for token in tokens
            ]
        return found

    def _triple(self, logprob: float | None, token_id: int) -> tuple[float | None, int, str | None]:
        text = self._frontend.tokenizer.decode([token_id]) if self._body.return_text_in_logprobs else None
        return logprob, token_id, text


@router.post("/generate")
async def generate(http: Request) -> Response:
    """One or several prompts in, their continuations out, whole or as server-sent events."""
    frontend: Frontend = http.app.state.frontend
    body = await read_body(http, GenerateBody, frontend.config.max_body_bytes)
    wanted = completion_body(body)
    try:
        call = await completion_call(frontend, wanted, "", http.headers)
    except InvalidRequest as error:
        raise renamed(error, body) from None
    for choice in call.choices:
        choice.echo = choice.echo and ""  # the prompt's log probabilities, but not its text
    is_single = isinstance(wanted.prompt, str) or isinstance(wanted.prompt[0], int)
    return GenerateAnswer(frontend, call, body, is_list=not is_single or len(call.choices) > 1)


def _finish(choice: Choice) -> dict[str, Any] | None:
    reason = choice.finish_reason
    if reason is None:
        return None
    if reason == "length":
        return {"type": reason, "length": choice.parser.num_tokens}
    if reason == "abort":
        return {"type": reason, "message": "the request was aborted"}
    return {"type": reason, "matched": choice.matched_stop}
