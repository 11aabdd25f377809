"""The HTTP application of one frontend."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from dsv4serve import __version__
from dsv4serve.api import (
    errors,
    openapi,
    routes_chat,
    routes_completions,
    routes_control,
    routes_generate,
    routes_messages,
    routes_metrics,
    routes_page,
    routes_responses,
    routes_server,
    routes_tokens,
)
from dsv4serve.api.frontend import Engine, Frontend
from dsv4serve.api.gate import Gate
from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.config import EngineConfig


def create_app(config: EngineConfig, client: Engine, tokenizer: ChatTokenizer) -> FastAPI:
    """All routes over one engine client; the Frontend is at `app.state.frontend`. Does not start the client."""
    app = FastAPI(title="dsv4serve", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.redirect_slashes = False
    frontend = app.state.frontend = Frontend(config, client, tokenizer)
    for routes in (
        openapi,
        routes_chat,
        routes_completions,
        routes_control,
        routes_generate,
        routes_messages,
        routes_responses,
        routes_tokens,
        routes_metrics,
        routes_server,
    ):
        app.include_router(routes.router)
    if config.page:
        app.include_router(routes_page.router)
    errors.install(app)
    app.add_middleware(Gate, frontend=frontend)
    if config.cors_origin:  # outside of the gate: a browser's first question carries no key
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origin, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app
