"""The door in front of all routes: keys, and no new work while the server drains. Plain ASGI, nothing per token."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv4serve.api.errors import error_response
from dsv4serve.api.frontend import Frontend
from dsv4serve.api.routes_page import FILES
from dsv4serve.api.turnstile import Turnstile
from dsv4serve.obs.requests import arrived, traceparent
from dsv4serve.types import Dsv4Error, ShuttingDown

OPEN = frozenset({"/health", "/health_generate", "/ready", "/metrics", *FILES})
CLIENT_GONE = 499  # nginx' word for a client that left before it got an answer


MAX_NAMES, MAX_NAME_CHARS = 20, 80  # in X-Ignored-Fields


class Unauthorized(Dsv4Error):
    """No accepted API key."""

    status = 401


class Gate:
    """Lets probes and the page through, refuses the rest without a key or during a drain, and counts what is inside."""

    def __init__(self, app: ASGIApp, frontend: Frontend) -> None:
        self._app, self._frontend = app, frontend
        self._keys = frontend.keys
        self._turnstile = Turnstile()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        frontend = self._frontend
        headers = dict(scope["headers"])
        if not self._keys.accepts(headers):
            frontend.metrics.responses.labels("other", Unauthorized.status).inc()
            error = Unauthorized("no valid API key: send the header 'Authorization: Bearer KEY'")
            await error_response(error, scope["path"], {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        if frontend.draining:
            frontend.metrics.responses.labels("other", ShuttingDown.status).inc()
            refusal = error_response(
                ShuttingDown("the server is shutting down"), scope["path"], {"Connection": "close"}
            )
            await refusal(scope, receive, send)
            return
        arrived.set(time.perf_counter())
        traceparent.set(headers.get(b"traceparent", b"").decode("latin-1"))
        answered = False

        def count(status: int) -> None:
            nonlocal answered
            if not answered:
                answered = True
                route = getattr(scope.get("route"), "path", "other")  # not the path: anybody can ask for any
                frontend.metrics.responses.labels(route, status).inc()

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
                if names := scope.get("ignored_fields"):
                    message["headers"] = [*message.get("headers", ()), (b"x-ignored-fields", _header(names))]
            await send(message)

        frontend.num_active += 1
        try:
            await self._turnstile.enter()
            await self._app(scope, receive, counting)
        except Exception:
            count(500)  # the answer is made outside of this door
            raise
        finally:
            frontend.num_active -= 1
            count(CLIENT_GONE)


def _header(names: Sequence[str]) -> bytes:
    """Names from a body, which may have any character, as the value of a header."""
    shown = [re.sub(r"[^\w.-]", "?", name[:MAX_NAME_CHARS], flags=re.ASCII) for name in names[:MAX_NAMES]]
    return ", ".join(shown).encode() + (b", ..." if len(names) > MAX_NAMES else b"")
