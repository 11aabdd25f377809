"""What an operator does to a running server: look at its settings, abort requests, empty the prefix cache."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from dsv4serve import __version__
from dsv4serve.api.body import read_body
from dsv4serve.api.errors import json_response
from dsv4serve.api.frontend import Frontend
from dsv4serve.api.schemas import AbortBody
from dsv4serve.types import Dsv4Error, InvalidRequest

router = APIRouter()
SECRET = {"api_key", "api_key_file", "admin_api_key"}


class Forbidden(Dsv4Error):
    """A key that is accepted, but not for this."""

    status = 403


@router.get("/server_info")
async def server_info(http: Request) -> Response:
    """Version, settings without keys, what the engine said of itself, and its numbers."""
    frontend: Frontend = http.app.state.frontend
    info = frontend.ready_info()
    body: dict[str, Any] = {"version": __version__, "settings": frontend.config.model_dump(mode="json", exclude=SECRET)}
    body |= {"engine": msgspec.to_builtins(info), "stats": msgspec.to_builtins(await frontend.engine.stats())}
    return json_response(body)


@router.post("/abort_request")
async def abort_request(http: Request) -> Response:
    """End the request with the id `rid` (header X-Request-Id of its answer), or with the admin key every request."""
    frontend: Frontend = http.app.state.frontend
    body = await read_body(http, AbortBody, frontend.config.max_body_bytes)
    if bool(body.rid) == bool(body.abort_all):
        raise InvalidRequest("give either rid or abort_all true", "rid")
    if body.abort_all:
        _check_admin(http)
    return json_response({"num_aborted": await frontend.engine.abort_call(body.rid)})


@router.post("/flush_cache")
async def flush_cache(http: Request) -> Response:
    """With the admin key: forget all prefixes. Requests that run keep what they use."""
    frontend: Frontend = http.app.state.frontend
    _check_admin(http)
    return json_response({"num_freed_pages": await frontend.engine.flush_cache()})


def _check_admin(http: Request) -> None:
    if not http.app.state.frontend.keys.accepts_admin(dict(http.scope["headers"])):
        raise Forbidden("this needs the admin key, see --admin-api-key")
