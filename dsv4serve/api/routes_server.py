"""What the server is and how it is doing: models, version, health, readiness."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from dsv4serve import __version__
from dsv4serve.api.errors import json_response
from dsv4serve.api.frontend import Frontend
from dsv4serve.types import EngineUnavailable, ShuttingDown

router = APIRouter()
STARTED = int(time.time())


@router.get("/v1/models")
async def models(http: Request) -> Response:
    """The one model served here."""
    frontend: Frontend = http.app.state.frontend
    return json_response({"object": "list", "data": [_card(frontend, frontend.check_model(None))]})


@router.get("/v1/models/{name:path}")
async def model(http: Request, name: str) -> Response:
    """The model called `name`, by its own name or an alias; 404 for any other."""
    frontend: Frontend = http.app.state.frontend
    return json_response(_card(frontend, frontend.check_model(name)))


@router.get("/version")
async def version() -> Response:
    """The server's version."""
    return json_response({"version": __version__})


@router.get("/health")
async def health(http: Request) -> Response:
    """200 while the engine's step loop answers."""
    frontend: Frontend = http.app.state.frontend
    if not await frontend.engine.is_alive():
        raise EngineUnavailable("the engine does not answer")
    return json_response({"status": "ok"})


@router.get("/health_generate")
async def health_generate(http: Request) -> Response:
    """200 when the model has just generated a token; those who ask at the same time share the attempt."""
    frontend: Frontend = http.app.state.frontend
    if not await frontend.probe.works():
        raise EngineUnavailable("no token was generated")
    return json_response({"status": "ok"})


@router.get("/model_info")
async def model_info(http: Request) -> Response:
    """What the served model is."""
    frontend: Frontend = http.app.state.frontend
    info = frontend.ready_info()
    return json_response(
        {
            "model_path": info.model_path,
            "tokenizer_path": str(frontend.config.model),
            "served_model_name": frontend.config.model_name,
            "is_generation": True,
            "max_model_len": info.max_model_len,
            "vocab_size": info.vocab_size,
            "eos_token_id": info.eos_token_id,
            "numerics": info.numerics,
            "effort_contract": frontend.effort_contract,
        }
    )


@router.get("/ready")
async def ready(http: Request) -> Response:
    """200 while new requests are taken: the engine is ready and the server does not drain."""
    frontend: Frontend = http.app.state.frontend
    if frontend.draining:
        raise ShuttingDown("the server is shutting down")
    frontend.ready_info()
    return json_response({"status": "ready"})


def _card(frontend: Frontend, name: str) -> dict[str, Any]:
    info = frontend.engine.info
    return {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "dsv4serve",
        "max_model_len": info and info.max_model_len,
        "vocab_size": info and info.vocab_size,
    }
