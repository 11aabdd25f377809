"""Bodies -> engine requests -> deltas: one Choice per sequence, all choices of a call merged into one stream."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from dsv4serve.api.errors import RequestFailed
from dsv4serve.api.frontend import Frontend
from dsv4serve.api.logprobs import Token
from dsv4serve.api.sampling import fit, sampling_params
from dsv4serve.api.schemas import REQUEST_ID, Sampling
from dsv4serve.chat.output import OutputParser
from dsv4serve.chat.render import OutputStart
from dsv4serve.chat.reply import Delta
from dsv4serve.chat.shown_reasoning import ShownReasoning
from dsv4serve.chat.tools import Tool
from dsv4serve.engine.messages import EngineInfo
from dsv4serve.obs.logging import request_id as log_request_id
from dsv4serve.obs.requests import RequestTimer
from dsv4serve.types import (
    Constraint,
    EngineUnavailable,
    FinishReason,
    InvalidRequest,
    QueueFull,
    Request,
    RequestOutput,
    TokenLogprobs,
)

SEED_BITS = 2**63 - 1
MAX_TIMEOUT_S = 10_000_000


@dataclass(slots=True)
class Choice:
    """One sequence of a call. `copy` numbers the choices of one prompt."""

    index: int
    copy: int
    request: Request
    parser: OutputParser
    include_stop: bool
    reasoning: ShownReasoning
    keeps_tokens: bool = False
    echo: str | None = None  # the prompt's text, if it comes before the output
    is_echo_only: bool = False
    tokens: list[Token] = field(default_factory=list)  # if kept: those of an echoed prompt, then the output's
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or requested stop id that ended it
    matched_stop: str | int | None = None  # the same, and EOS's id where that ended it
    num_cached_tokens: int = 0

    def feed(self, output: RequestOutput, eos_token_id: int) -> Delta:
        """Take one engine output. Raises RequestFailed when it is an error."""
        if output.num_cached_tokens is not None:
            self.num_cached_tokens = output.num_cached_tokens
        if output.finish_reason is FinishReason.ERROR:
            raise _failure(output)
        echo = self._take_echo(output)
        if self.is_echo_only:
            self.finish_reason = FinishReason.LENGTH.value
            return Delta(content=echo)
        num_before = self.parser.num_tokens
        delta = self.parser.feed(output.token_ids, None if self.include_stop else output.stop_token_id)
        delta.content = echo + delta.content
        if self.keeps_tokens:
            num_new = self.parser.num_tokens - num_before
            logprobs: Sequence[TokenLogprobs | None] = output.logprobs or [None] * num_new
            self.tokens += map(Token, output.token_ids[:num_new], logprobs[:num_new])
        if output.finish_reason is not None and not self.parser.is_done:
            delta.extend(self.parser.finish(is_cut=output.finish_reason is not FinishReason.STOP))
        if self.parser.stopped_by is not None:
            self.finish_reason = FinishReason.STOP.value
            self.stop_reason = self.matched_stop = self.parser.stopped_by
        elif self.parser.is_done:
            self.finish_reason = FinishReason.STOP.value
        elif output.finish_reason is not None:
            self.finish_reason = output.finish_reason.value
            self.matched_stop = output.stop_token_id
            self.stop_reason = None if output.stop_token_id == eos_token_id else output.stop_token_id
        if self.parser.has_calls and self.finish_reason == FinishReason.STOP.value:
            self.finish_reason = "tool_calls"
        return self.reasoning.rewrite(delta, self.parser.may_reason, self.finish_reason is not None)

    def _take_echo(self, output: RequestOutput) -> str:
        """The prompt's text, with the first output."""
        echo, self.echo = self.echo, None
        if echo is not None and self.keeps_tokens:
            ids = self.request.prompt_ids
            known: Sequence[TokenLogprobs | None] = output.prompt_logprobs or [None] * (len(ids) - 1)
            self.tokens += [Token(*pair, is_prompt=True) for pair in zip(ids, [None, *known], strict=True)]
        return echo or ""


@dataclass(slots=True)
class Event:
    """New text of one choice; `is_last` when it is the choice's end."""

    choice: Choice
    delta: Delta
    is_last: bool
    tokens: list[Token] = field(default_factory=list)  # if kept: the new ones


@dataclass(slots=True)
class Call:
    """One HTTP request that generates."""

    request_id: str  # the client's, else the response's
    response_id: str
    model: str
    choices: list[Choice]
    num_prompt_tokens: int
    timeout_s: float | None
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> dict[str, Any]:
        """Token counts so far: each prompt once, outputs summed over the choices."""
        num_output = sum(choice.parser.num_tokens for choice in self.choices)
        num_cached = sum(choice.num_cached_tokens for choice in self.choices if choice.copy == 0)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_output,
            "total_tokens": self.num_prompt_tokens + num_output,
            "prompt_tokens_details": {"cached_tokens": num_cached},
            "completion_tokens_details": {
                "reasoning_tokens": sum(choice.parser.num_reasoning_tokens for choice in self.choices)
            },
            "prompt_cache_hit_tokens": num_cached,
            "prompt_cache_miss_tokens": self.num_prompt_tokens - num_cached,
        }


def build_call(
    frontend: Frontend,
    info: EngineInfo,
    body: Sampling,
    prompts: Sequence[list[int]],
    max_tokens: int | None,
    *,
    prefix: str,
    start: OutputStart | None,
    tools: Sequence[Tool] | None = None,
    headers: Mapping[str, str],
    constraint: Constraint | None = None,
) -> Call:
    """The engine requests of one HTTP request.

    `max_tokens` None is the rest of the context, 0 the prompt alone, echoed; `prefix` starts the response id; `start`
    and `tools` are those of chat.output.OutputParser; `headers` may bring X-Request-Id and X-Request-Timeout.
    `constraint` is what each output must match. Raises InvalidRequest when lengths or ids do not fit the model.
    """
    model = frontend.check_model(body.model)
    own_id = body.request_id or body.rid or headers.get("x-request-id")
    if own_id and not re.fullmatch(REQUEST_ID, own_id):
        raise InvalidRequest("X-Request-Id: expected 1 to 128 letters, digits and . _ : -", "X-Request-Id")
    response_id = f"{prefix}{own_id or secrets.token_hex(12)}"
    request_id = own_id or response_id
    # One id may be in use at two frontends, or still end in the engine; what comes after the slash is never the same.
    engine_id = f"{request_id}/{secrets.token_hex(4)}"
    params = sampling_params(frontend, info, body, start, may_call=tools is not None)
    if constraint is not None:
        params = msgspec.structs.replace(params, constraint=constraint)
    log_request_id.set(own_id or response_id)
    num_copies, sign = body.n or 1, -1 if frontend.config.high_priority_first else 1
    is_echo_only, skip_special_tokens = max_tokens == 0, body.skip_special_tokens is not False
    choices: list[Choice] = []
    for prompt in prompts:
        base = body.seed if body.seed is not None else secrets.randbits(63)
        frontend.check_length(len(prompt), info.max_model_len)
        echo = frontend.tokenizer.decode(prompt, skip_special_tokens) if body.echoes else None
        for copy in range(num_copies):
            index = len(choices)
            parser = OutputParser(
                frontend.tokenizer,
                start=start,
                tools=tools,
                stops=body.stops,
                include_stop=body.keeps_stop,
                min_tokens=params.min_tokens,
                skip_special_tokens=skip_special_tokens,
            )
            request = Request(
                request_id=f"{engine_id}-{index}",
                prompt_ids=prompt,
                sampling=fit(params, info, len(prompt), 1 if is_echo_only else max_tokens, derive_seed(base, copy)),
                priority=sign * (body.priority or 0),
                cache_salt=body.cache_scope,
            )
            reasoning = ShownReasoning(body.reasoning_form, start)
            keeps_tokens = body.num_logprobs is not None or bool(body.return_token_ids)
            rest = (keeps_tokens, echo, is_echo_only)
            choices.append(Choice(index, copy, request, parser, body.keeps_stop, reasoning, *rest))
    timeout_s = _timeout(headers.get("x-request-timeout"), frontend.config.request_timeout_s)
    return Call(request_id, response_id, model, choices, sum(map(len, prompts)), timeout_s)


def derive_seed(base: int, copy: int) -> int:
    """The seed of the `copy`-th choice: the base itself, then SplitMix64 (Steele, Lea, Flood 2014) of base and copy."""
    if copy == 0:
        return base
    mixed = (base + copy * 0x9E3779B97F4A7C15) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & SEED_BITS


async def run(frontend: Frontend, call: Call) -> AsyncGenerator[Event, None]:
    """Events of all choices as they come. Closing it aborts what is open. Raises what ended a choice in error."""
    if len(call.choices) == 1:  # the common case needs no task and no queue per token
        async with aclosing(_run_choice(frontend, call.choices[0])) as events:
            async for event in events:
                yield event
        return
    queue: asyncio.Queue[Event | Exception] = asyncio.Queue()

    async def pump(choice: Choice) -> None:
        try:
            async with aclosing(_run_choice(frontend, choice)) as events:
                async for event in events:
                    queue.put_nowait(event)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(choice)) for choice in call.choices]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            num_open -= item.is_last
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def end_after(frontend: Frontend, call: Call) -> None:
    """When the call's time is over, end its choices with finish_reason abort and what they have so far."""
    if call.timeout_s is not None:
        await asyncio.sleep(call.timeout_s)
        for choice in call.choices:
            await frontend.engine.abort(choice.request.request_id)


async def _run_choice(frontend: Frontend, choice: Choice) -> AsyncGenerator[Event, None]:
    info, request = frontend.ready_info(), choice.request
    stream = cast(AsyncGenerator[RequestOutput, None], frontend.engine.submit(request))
    frontend.running.add(request.request_id)
    timer = RequestTimer(request, frontend.metrics, frontend.tracer)
    try:
        async with aclosing(stream):
            async for output in stream:
                timer.output(output)
                num_before = len(choice.tokens)
                delta = choice.feed(output, info.eos_token_id)
                yield Event(choice, delta, choice.finish_reason is not None, choice.tokens[num_before:])
                if choice.finish_reason is not None:
                    return  # after a stop string or calls the engine may still be at it: closing the stream aborts it
    except Exception:
        choice.finish_reason = FinishReason.ERROR
        raise
    finally:
        timer.end(choice.finish_reason or FinishReason.ABORT, choice.parser.malformed)
        frontend.running.discard(request.request_id)
    raise EngineUnavailable("the engine ended the request without a result")


def _timeout(header: str | None, limit_s: float) -> float | None:
    """Seconds that a call may take: what the header asks for, at most `limit_s` unless that is 0."""
    limit = limit_s or None
    if header is None:
        return limit
    try:
        wanted = float(header) if "_" not in header else 0.0  # which Python reads as digits are read
    except ValueError:
        wanted = 0.0
    if not 0 < wanted < MAX_TIMEOUT_S:
        raise InvalidRequest(f"X-Request-Timeout: expected seconds, above 0 and below {MAX_TIMEOUT_S}, got {header!r}")
    return wanted if limit is None else min(wanted, limit)


def _failure(output: RequestOutput) -> Exception:
    message = output.error or "the engine failed"
    known: dict[int | None, Exception] = {
        InvalidRequest.status: InvalidRequest(message),
        QueueFull.status: QueueFull(message),
        EngineUnavailable.status: EngineUnavailable(message),
    }
    return known.get(output.error_status) or RequestFailed(message, output.error_status)
