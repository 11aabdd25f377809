"""Request bodies: bounded reading, JSON, schema; every failure an InvalidRequest or BodyTooLarge."""

from __future__ import annotations

import reprlib
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from dsv4serve.api import large_json
from dsv4serve.api.errors import BodyTooLarge
from dsv4serve.api.frontend import Frontend
from dsv4serve.api.strict import Strict
from dsv4serve.types import InvalidRequest

Schema = TypeVar("Schema", bound=Strict)
SHOWN_INPUT = 80  # characters of a wrong value that an error message repeats
LARGE_BYTES = 1 << 18  # a body above that is read beside the event loop, in pieces: it takes more than 5 ms


async def read_body(request: Request, schema: type[Schema], max_bytes: int) -> Schema:
    """The body of `request` as `schema`. Reads at most `max_bytes`, whatever Content-Length says.

    What means nothing here is left in the scope as `ignored_fields`, for the header of the answer.
    """
    chunks: list[bytes] = []
    size = 0
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(max_bytes)
            chunks.append(chunk)
    except ClientDisconnect:
        raise InvalidRequest("the client closed the connection while sending the body") from None
    raw = b"".join(chunks)
    if size > LARGE_BYTES:
        frontend: Frontend = request.app.state.frontend
        body, unknown = await frontend.in_thread(lambda: _parse(raw, schema))
    else:
        body, unknown = _parse(raw, schema)
    request.scope["ignored_fields"] = unknown
    return body


def _parse(raw: bytes, schema: type[Schema]) -> tuple[Schema, list[str]]:
    body = parse_body(raw, schema)
    return body, body.unknown_fields()


def parse_body(raw: bytes, schema: type[Schema]) -> Schema:
    """`raw` as `schema`. Raises InvalidRequest naming the first wrong field and what is allowed."""
    try:
        value = large_json.loads(raw) if len(raw) > LARGE_BYTES else orjson.loads(raw)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    return validate(value, schema)


def validate(value: dict[str, Any], schema: type[Schema]) -> Schema:
    """`value` as `schema`. Raises InvalidRequest naming the first wrong field and what is allowed."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        param = ".".join(map(str, item["loc"])) or None
        raise InvalidRequest(_explain(dict(item), schema), param) from None


def _explain(item: dict[str, Any], schema: type[BaseModel]) -> str:
    name = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        known = f"; known fields: {', '.join(schema.model_fields)}" if len(item["loc"]) == 1 else ""
        return f"unknown field {name[:SHOWN_INPUT]!r}{known}"
    message = str(item["msg"])
    if item["type"] == "missing":
        return f"{name}: this field is required"
    got = reprlib.repr(item.get("input"))  # of a million values too
    got = got if len(got) <= SHOWN_INPUT else got[:SHOWN_INPUT] + "..."
    return f"{name}: {message[:1].lower()}{message[1:]} (got {got})"


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {max_bytes} bytes")
