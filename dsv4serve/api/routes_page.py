"""The playground at /: static files that talk to the same API as any other client."""

from __future__ import annotations

import functools
import importlib.resources

from fastapi import APIRouter, Request, Response

router = APIRouter()

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/api.js": ("api.js", "text/javascript; charset=utf-8"),
    "/live.js": ("live.js", "text/javascript; charset=utf-8"),
}
# The browser asks nobody but this server, runs no inline script, and turns no text into HTML.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # another version of the server may answer at the same address tomorrow
}


async def page(http: Request) -> Response:
    """One of FILES. No key is needed: the page holds nothing, its calls need the key."""
    name, kind = FILES[http.url.path]
    return Response(_content(name), headers=HEADERS | {"Content-Type": kind})


for _path in FILES:
    router.add_api_route(_path, page, methods=["GET"])


@functools.cache
def _content(name: str) -> bytes:
    return (importlib.resources.files("dsv4serve.api") / "static" / name).read_bytes()
