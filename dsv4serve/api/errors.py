"""Every failure as one body: {"error": {"message", "type", "param", "code"}}, code = the HTTP status.

Below /v1/messages it is Anthropic's: {"type": "error", "error": {"type", "message"}}.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from dsv4serve.types import Dsv4Error

logger = logging.getLogger(__name__)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {500: "api_error", 503: "overloaded_error"}
RETRY_AFTER_S = {429: "1", 503: "2"}
INTERNAL = "internal error; the server's log has the details"


class RequestFailed(Dsv4Error):
    """The engine ended a request with an error of `status`."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status if status is not None and 400 <= status <= 599 else 500


class BodyTooLarge(Dsv4Error):
    """The HTTP body exceeds max_body_bytes."""

    status = 413


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`body` as application/json."""
    return Response(orjson.dumps(body), status, headers, "application/json")


def error_body(error: Exception) -> dict[str, Any]:
    """The body for `error`. What is not meant for a client is logged and told as an internal error."""
    status = getattr(error, "status", 500) if isinstance(error, Dsv4Error) else 500
    message = str(error)
    if status == 500:
        # The engine's failures are logged where they happen; only what nobody expected needs a traceback here.
        logger.error("a request failed: %s", error, exc_info=None if isinstance(error, RequestFailed) else error)
        message = INTERNAL
    return _body(message, status, getattr(error, "param", None))


def anthropic_body(body: dict[str, Any]) -> dict[str, Any]:
    """The same error as Anthropic's clients expect it."""
    error = body["error"]
    where = f"{error['param']}: " if error["param"] else ""
    kind = ANTHROPIC_TYPES.get(error["code"], error["type"])
    return {"type": "error", "error": {"type": kind, "message": where + error["message"]}}


def error_response(error: Exception, path: str, headers: Mapping[str, str] | None = None) -> Response:
    """The HTTP answer for `error` to a request for `path`."""
    return _response(error_body(error), path, headers)


def install(app: FastAPI) -> None:
    """Make every exception of `app` answer in this shape."""

    def known(request: Request, error: Exception) -> Response:
        return error_response(error, request.url.path)

    def http(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        detail = {
            404: f"no such route: {request.url.path}",
            405: f"{request.method} is not allowed for {request.url.path}",
        }.get(status, str(getattr(error, "detail", error)))
        return _response(_body(detail, status, None), request.url.path, getattr(error, "headers", None))

    def invalid(request: Request, error: Exception) -> Response:
        items = error.errors() if isinstance(error, RequestValidationError) else []
        message = "; ".join(str(item.get("msg")) for item in items) or str(error)
        param = ".".join(map(str, items[0].get("loc", ()))) if items else None
        return _response(_body(message, 400, param), request.url.path, None)

    app.add_exception_handler(Dsv4Error, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, known)


def _response(body: dict[str, Any], path: str, headers: Mapping[str, str] | None) -> Response:
    status = body["error"]["code"]
    retry = {"Retry-After": RETRY_AFTER_S[status]} if status in RETRY_AFTER_S else {}
    if path.startswith(ANTHROPIC_PATH):
        body = anthropic_body(body)
    return json_response(body, status, {**retry, **(headers or {})})


def _body(message: str, status: int, param: str | None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
