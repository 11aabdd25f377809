"""A conversation over /v1/chat/completions: history, one streamed answer at a time, and what the answer cost."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from dsv4serve.types import Dsv4Error

CONNECT_TIMEOUT_S = 10.0


class ServerError(Dsv4Error):
    """The server cannot be reached or refuses."""

    exit_code = 2


@dataclass
class ToolCall:
    """A call that the model asks for. `arguments` is the JSON text as it came."""

    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass
class Answer:
    """One answer, filled while it streams. Times are seconds of one monotonic clock; `usage` is the server's."""

    start_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    reasoning: str = ""
    content: str = ""
    calls: dict[int, ToolCall] = field(default_factory=dict)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    def take(self, event: dict[str, Any]) -> tuple[str, str]:
        """Add one event of the stream; returns its new (reasoning, content)."""
        self.usage = event.get("usage") or self.usage
        if not event.get("choices"):
            return "", ""
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s
        choice = event["choices"][0]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta") or {}
        reasoning, content = delta.get("reasoning_content") or "", delta.get("content") or ""
        self.reasoning += reasoning
        self.content += content
        for part in delta.get("tool_calls") or ():
            call = self.calls.setdefault(part.get("index", 0), ToolCall())
            function = part.get("function") or {}
            call.id += part.get("id") or ""
            call.name += function.get("name") or ""
            call.arguments += function.get("arguments") or ""
        return reasoning, content

    def message(self) -> dict[str, Any]:
        """The assistant's message for the history."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls.values()
            ]
        return message

    def summary(self) -> str:
        """Tokens, tokens/s, TTFT, cached tokens and accepted drafts, as far as the server counts them."""
        parts = []
        count = self.usage.get("completion_tokens")
        if count is not None:
            parts.append(f"{count} tokens")
            if count > 1 and self.last_s > self.first_s:
                parts.append(f"{(count - 1) / (self.last_s - self.first_s):.1f} tokens/s")
        if self.first_s:
            parts.append(f"TTFT {(self.first_s - self.start_s) * 1000:.0f} ms")
        cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if cached is not None:
            parts.append(f"{cached} of {self.usage['prompt_tokens']} prompt tokens cached")
        details = self.usage.get("completion_tokens_details") or {}
        accepted = details.get("accepted_prediction_tokens") or 0
        drafted = accepted + (details.get("rejected_prediction_tokens") or 0)
        if drafted:
            parts.append(f"{accepted} of {drafted} drafts accepted")
        if self.finish_reason == "length":
            parts.append("cut at the token limit")
        elif self.finish_reason is None:
            parts.append("stopped")
        return ", ".join(parts)


class Conversation:
    """History with one server. `options` are fields added to every request; `thinking` None is the server's default."""

    def __init__(self, client: httpx.Client, model: str, tools: list[Any], options: dict[str, Any]) -> None:
        self._client, self._model, self._options = client, model, options
        self._tools = tools
        self.system = ""
        self.thinking: bool | None = None
        self.messages: list[dict[str, Any]] = []
        self._waiting: list[ToolCall] = []  # calls whose results are to be given next

    @property
    def awaited(self) -> ToolCall | None:
        """The call whose result the next `say` gives; None when it is the user's turn."""
        return self._waiting[0] if self._waiting else None

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.messages, self._waiting = [], []

    def say(self, text: str) -> bool:
        """Add a result if one is awaited, else the user's turn. True when the model is to answer now."""
        if self._waiting:
            self.messages.append({"role": "tool", "tool_call_id": self._waiting.pop(0).id, "content": text})
        else:
            self.messages.append({"role": "user", "content": text})
        return not self._waiting

    @contextmanager
    def answer(self) -> Iterator[tuple[Answer, Generator[tuple[str, str]]]]:
        """The answer and its new (reasoning, content) pieces as they come.

        Leaving the block closes the stream, which makes the server abort what still runs; what has come by then
        enters the history. When the request fails, the turn it was for is forgotten. Raises ServerError.
        """
        answer = Answer(time.perf_counter())
        try:
            with self._client.stream("POST", "/v1/chat/completions", content=self._body()) as response:
                check(response)
                yield answer, self._pieces(response, answer)
        except httpx.HTTPError as error:
            self._forget_turn()
            raise unreachable(self._client, error) from None
        except (ServerError, KeyboardInterrupt):
            self._forget_turn()
            raise
        if answer.finish_reason is None:
            answer.calls.clear()  # cut off, so their arguments may not be JSON
        if answer.first_s:
            self.messages.append(answer.message())
            self._waiting = list(answer.calls.values())
        else:
            self._forget_turn()

    def _forget_turn(self) -> None:
        while self.messages and self.messages[-1]["role"] != "user":
            self.messages.pop()
        del self.messages[-1:]

    def _body(self) -> bytes:
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {
            "model": self._model,
            "messages": system + self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        if self._tools:
            body["tools"] = self._tools
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"thinking": self.thinking}
        return orjson.dumps(body)

    @staticmethod
    def _pieces(response: httpx.Response, answer: Answer) -> Generator[tuple[str, str]]:
        for line in response.iter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                return
            try:
                event = orjson.loads(data)
            except orjson.JSONDecodeError:
                raise ServerError(f"the stream holds something that is not JSON: {data[:100]}") from None
            if "error" in event:
                raise ServerError(_message(event))
            yield answer.take(event)
        raise ServerError("the server ended the stream before the answer was complete")


def connect(url: str, api_key: str) -> httpx.Client:
    """A client of the server at `url` (with or without /v1). Answers may take any time, connecting may not."""
    headers = {"content-type": "application/json"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    try:
        return httpx.Client(
            base_url=url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            trust_env=False,  # a proxy does not reach a server on this machine
        )
    except httpx.InvalidURL as error:
        raise ServerError(f"{url}: {error}") from None


def served_model(client: httpx.Client, wanted: str) -> str:
    """`wanted` if the server has it, or its first model. Raises ServerError, which is also how a wrong address or key
    shows."""
    try:
        response = client.get("/v1/models", timeout=CONNECT_TIMEOUT_S)
        check(response)
        names = [card["id"] for card in response.json()["data"]]
    except httpx.HTTPError as error:
        raise unreachable(client, error) from None
    except (ValueError, LookupError, TypeError):
        raise ServerError(f"{client.base_url}v1/models does not answer as an OpenAI-compatible server does") from None
    name = wanted or next(iter(names), "")
    if name not in names:
        raise ServerError(f"the server has no model {name!r}; it has {', '.join(names) or 'none'}")
    return name


def check(response: httpx.Response) -> None:
    """Raises ServerError with the server's own words unless the status is 200."""
    if response.status_code == 200:
        return
    response.read()
    try:
        message = _message(orjson.loads(response.content))
    except (ValueError, LookupError, TypeError):
        message = response.text[:300] or response.reason_phrase
    hint = "; give the key with --api-key" if response.status_code == 401 else ""
    raise ServerError(f"HTTP {response.status_code}: {message}{hint}")


def unreachable(client: httpx.Client, error: httpx.HTTPError) -> ServerError:
    """What to say when there was no answer."""
    return ServerError(f"no answer from {client.base_url}: {str(error) or type(error).__name__}")


def _message(body: Any) -> str:
    error = body["error"]
    return str(error["message"] if isinstance(error, dict) else error)
