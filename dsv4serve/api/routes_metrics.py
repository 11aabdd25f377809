"""How the server is doing: GET /metrics for Prometheus, GET /stats for people."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

from dsv4serve.api.engine_metrics import engine_metrics
from dsv4serve.api.errors import json_response
from dsv4serve.api.frontend import Frontend

router = APIRouter()


class _Server(Collector):
    """The metrics of the engine and of all frontends."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    def collect(self) -> Iterator[Metric]:
        yield from engine_metrics(self._frontend.live, self._frontend.engine.info)
        yield from self._frontend.metrics.collect()


@router.get("/metrics")
async def metrics(http: Request) -> Response:
    """All metrics of the whole server, whichever frontend answers, in Prometheus' text format. Needs no key."""
    frontend: Frontend = http.app.state.frontend
    await frontend.live.refresh()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Server(frontend))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/stats")
async def stats(http: Request) -> Response:
    """Numbers of the whole server (all frontends) for people to look at; Prometheus reads /metrics.

        {"engine_ready": true,
         "running": 3, "queued": 0,                       requests in slots, requests that wait
         "prompt_tokens_per_s": 812.5,                    computed, cached ones not counted; last 10 s
         "generated_tokens_per_s": 93.1,                  last 10 s
         "ttft_s": {"p50": 0.12, "p95": 0.31, "max": 0.5},   time to first token, last minute; null without any; from a
                                                          histogram, so max is the bound of its bucket
         "itl_s": {"p50": 0.021, "p95": 0.034, "max": 0.05},   between two tokens of a request; same
         "event_loop_lag_s": {"p50": ...},                how late the event loops of the frontends wake; same
         "slots": {"used": 3, "total": 16},
         "pages": {"used": 12, "cached": 40, "total": 512},   used = held by requests, cached = by the prefix cache
         "tails": {"used": 1, "cached": 9, "total": 32},      alone, the rest is free
         "prefix_hit_rate": 0.42,                         share of prompt tokens not computed, last minute; or null
         "acceptance": {"accept_rate": 0.57,              accepted / all drafts, last minute; null without any
                        "accept_length": 2.71,            tokens per verify: accepted drafts and the one after them
                        "by_position": [0.8, 0.56, 0.35], share of first, second, .. drafts that were accepted
                        "is_low": false}}                 true: far below what was usual, see the engine's log

    Without an engine that answers, engine_ready is false and all of its numbers are null.
    """
    frontend: Frontend = http.app.state.frontend
    await frontend.live.refresh()
    return json_response(frontend.live.report())
