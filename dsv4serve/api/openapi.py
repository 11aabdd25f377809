"""GET /openapi.json: what every route takes and answers, from the schemas that check the bodies."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from fastapi import APIRouter, Response
from pydantic import BaseModel

from dsv4serve import __version__
from dsv4serve.api.errors import ANTHROPIC_PATH, json_response
from dsv4serve.api.generate_prompt import GenerateBody
from dsv4serve.api.messages_prompt import CountBody, MessagesBody
from dsv4serve.api.responses_prompt import ResponsesBody
from dsv4serve.api.schemas import AbortBody, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

router = APIRouter()
JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
ALWAYS = (401, 500, 503)
BODY = (*ALWAYS, 400, 404, 413)
GENERATING = (*BODY, 429)


class Route(NamedTuple):
    """One route: its body, the fields that its answer always has, its error statuses, the types of its answer."""

    method: str
    path: str
    summary: str
    fields: tuple[str, ...]
    errors: tuple[int, ...] = ALWAYS
    body: type[BaseModel] | None = None
    media: tuple[str, ...] = (JSON,)


STREAMED = (JSON, EVENTS)
CHOICES = ("id", "object", "created", "model", "choices", "usage")
ROUTES = (
    Route("post", "/v1/chat/completions", "Messages in, the next turn out", CHOICES, GENERATING, ChatBody, STREAMED),
    Route("post", "/v1/completions", "A prompt in, its rest out", CHOICES, GENERATING, CompletionBody, STREAMED),
    Route(
        "post",
        "/v1/responses",
        "OpenAI's Responses API, without state",
        ("id", "object", "created_at", "status", "model", "output", "usage"),
        GENERATING,
        ResponsesBody,
        STREAMED,
    ),
    Route(
        "post",
        "/v1/messages",
        "Anthropic's Messages API",
        ("id", "type", "role", "model", "content", "stop_reason", "usage"),
        GENERATING,
        MessagesBody,
        STREAMED,
    ),
    Route("post", "/generate", "SGLang's own completions", (), GENERATING, GenerateBody, STREAMED),
    Route("post", "/v1/messages/count_tokens", "Tokens of a prompt", ("input_tokens",), BODY, CountBody),
    Route("post", "/tokenize", "Text or messages to ids", ("tokens", "count", "max_model_len"), BODY, TokenizeBody),
    Route("post", "/detokenize", "Ids to text", ("text", "prompt"), BODY, DetokenizeBody),
    Route("get", "/tokenizer_info", "Special tokens", ("bos_token", "eos_token", "pad_token", "model_max_length")),
    Route("post", "/abort_request", "End a request, or all", ("num_aborted",), (*BODY, 403), AbortBody),
    Route("post", "/flush_cache", "Forget all prefixes", ("num_freed_pages",), (*ALWAYS, 403)),
    Route("get", "/v1/models", "The served model, as a list", ("object", "data")),
    Route("get", "/v1/models/{name}", "The served model", ("id", "object", "created", "owned_by"), (*ALWAYS, 404)),
    Route("get", "/server_info", "Version, settings, engine", ("version", "settings", "engine", "stats")),
    Route("get", "/version", "The version", ("version",)),
    Route("get", "/model_info", "The model's facts", ("model_path", "is_generation", "max_model_len", "vocab_size")),
    Route("get", "/stats", "Live numbers", ("engine_ready", "running", "queued")),
    Route("get", "/metrics", "Metrics for Prometheus", (), ALWAYS, None, (TEXT,)),
    Route("get", "/health", "Whether the engine answers", ("status",), (500, 503)),
    Route("get", "/health_generate", "Whether a token is generated", ("status",), (500, 503)),
    Route("get", "/ready", "Whether requests are taken", ("status",), (500, 503)),
    Route("get", "/openapi.json", "This document", ("openapi", "info", "paths")),
)


@cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    components: dict[str, Any] = {
        "Error": _object(error=_object(message={"type": "string"}, type={"type": "string"}, param={}, code={})),
        "AnthropicError": _object(type={"const": "error"}, error=_object(type={}, message={"type": "string"})),
    }
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route, components)
    keys = {"bearer": {"type": "http", "scheme": "bearer"}}
    keys["header"] = {"type": "apiKey", "in": "header", "name": "x-api-key"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "dsv4serve", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": keys},
        "security": [{}, {"bearer": []}, {"header": []}],
    }


@router.get("/openapi.json")
async def openapi() -> Response:
    """The document."""
    return json_response(document())


def _operation(route: Route, components: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: {} for name in route.fields}  # none: an object or a list
    answer: dict[str, Any] = {JSON: {"schema": _object(**fields) if fields else {}}}
    content = {media: answer.get(media, {"schema": {"type": "string"}}) for media in route.media}
    error = "AnthropicError" if route.path.startswith(ANTHROPIC_PATH) else "Error"
    failed = {JSON: {"schema": {"$ref": f"#/components/schemas/{error}"}}}
    responses: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    responses |= {str(status): {"description": "error", "content": failed} for status in sorted(route.errors)}
    operation: dict[str, Any] = {"summary": route.summary, "responses": responses}
    if "{name}" in route.path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if route.body is not None:
        schema = route.body.model_json_schema(ref_template="#/components/schemas/{model}")
        components.update(schema.pop("$defs", {}))
        components[route.body.__name__] = schema
        content = {JSON: {"schema": {"$ref": f"#/components/schemas/{route.body.__name__}"}}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
