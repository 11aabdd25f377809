"""A closed loop of streaming completion requests, and what it measured.

`concurrency` workers each keep one request open: when it ends they send the next. Prompts are random token
ids (no prefix reuse), outputs have a fixed length (`ignore_eos`). Definitions, in the client's clock:

- TTFT: from sending the request to the first streamed chunk that carries output.
- ITL: between two successive chunks that carry output (a chunk can hold more than one token).
- TPOT: (last chunk - first chunk) / (output tokens - 1), one value a request; TTFT is not in it.
- Interactivity: 1000 / p50 of TPOT in ms = tokens per second that one user sees.
- End to end: from sending the request to the end of its stream.
- Throughput: tokens of completed requests / time from the first request sent to the last stream's end.
  Tokens are counted by the server (`usage`), input and output.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import orjson

from dsv4serve.types import Dsv4Error

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """What is sent. Lengths are tokens; a range ratio r draws them uniformly from [r * length, length]."""

    model: str
    concurrency: int
    num_requests: int
    num_warmup: int
    input_tokens: int
    output_tokens: int
    random_range_ratio: float
    vocab_size: int
    seed: int


@dataclass(kw_only=True)
class RequestRecord:
    """One request as its client saw it. Times are seconds of one monotonic clock; `error` means it failed."""

    start_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    end_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None


def request_bodies(settings: LoadSettings, count: int, seed: str) -> list[bytes]:
    """`count` JSON bodies for /v1/completions; the same settings and seed give the same bytes."""
    draw = random.Random(seed)
    ids = range(settings.vocab_size)

    def length(limit: int) -> int:
        return draw.randint(max(1, round(limit * settings.random_range_ratio)), limit)

    return [
        orjson.dumps(
            {
                "model": settings.model,
                "prompt": draw.choices(ids, k=length(settings.input_tokens)),
                "max_tokens": length(settings.output_tokens),
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        for _ in range(count)
    ]


async def run_load(
    client: httpx.AsyncClient, settings: LoadSettings, on_end: Callable[[RequestRecord], None]
) -> list[RequestRecord]:
    """Warm up, then run the measured requests; `on_end` sees each measured one as it ends.

    Raises Dsv4Error when a warm-up request fails: numbers of a broken server mean nothing.
    """
    warmup = await _closed_loop(
        client, request_bodies(settings, settings.num_warmup, f"{settings.seed} warm-up"), settings.concurrency
    )
    for record in warmup:
        if record.error:
            raise Dsv4Error(f"a warm-up request failed: {record.error}")
    bodies = request_bodies(settings, settings.num_requests, f"{settings.seed} measured")
    return await _closed_loop(client, bodies, settings.concurrency, on_end)


def summarize(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """The numbers of a run: counts, throughput (per second), latencies (ms) and failures by message."""
    done = [record for record in records if record.error is None]
    duration_s = max(record.end_s for record in records) - min(record.start_s for record in records)
    num_input = sum(record.num_input_tokens for record in done)
    num_output = sum(record.num_output_tokens for record in done)
    tpot_s = [(r.last_s - r.first_s) / (r.num_output_tokens - 1) for r in done if r.num_output_tokens > 1]
    tpot_ms = _spread(tpot_s)
    return {
        "num_completed": len(done),
        "num_failed": len(records) - len(done),
        "failures": dict(Counter(record.error for record in records if record.error)),
        "duration_s": round(duration_s, 4),
        "num_input_tokens": num_input,
        "num_output_tokens": num_output,
        "requests_per_s": round(len(done) / duration_s, 4),
        "input_tokens_per_s": round(num_input / duration_s, 2),
        "output_tokens_per_s": round(num_output / duration_s, 2),
        "total_tokens_per_s": round((num_input + num_output) / duration_s, 2),
        "interactivity": round(1000 / tpot_ms["p50"], 2) if tpot_ms and tpot_ms["p50"] else None,
        "ttft_ms": _spread([record.first_s - record.start_s for record in done]),
        "itl_ms": _spread([gap for record in done for gap in record.gaps_s]),
        "tpot_ms": tpot_ms,
        "e2e_ms": _spread([record.end_s - record.start_s for record in done]),
    }


def _spread(seconds: list[float]) -> dict[str, float] | None:
    """Mean and percentiles (linear interpolation) in ms; None of nothing."""
    if not seconds:
        return None
    names = ["mean", *(f"p{percentile}" for percentile in PERCENTILES)]
    values = [np.mean(seconds), *np.percentile(seconds, PERCENTILES)]
    return {name: round(float(value) * 1000, 3) for name, value in zip(names, values, strict=True)}


async def _closed_loop(
    client: httpx.AsyncClient,
    bodies: list[bytes],
    concurrency: int,
    on_end: Callable[[RequestRecord], None] = lambda record: None,
) -> list[RequestRecord]:
    records: list[RequestRecord] = []
    waiting: Iterator[bytes] = iter(bodies)

    async def work() -> None:
        for body in waiting:  # shared by all workers: who is free takes the next
            record = await _complete(client, body)
            records.append(record)
            on_end(record)

    await asyncio.gather(*(work() for _ in range(min(concurrency, len(bodies)))))
    return records


async def _complete(client: httpx.AsyncClient, body: bytes) -> RequestRecord:
    record = RequestRecord(start_s=time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", content=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise Dsv4Error(f"HTTP {response.status_code}: {response.text[:300]}")
            await _follow(response, record)
    except (Dsv4Error, httpx.HTTPError, ValueError) as error:
        record.error = str(error) or type(error).__name__
    record.end_s = time.perf_counter()
    return record


async def _follow(response: httpx.Response, record: RequestRecord) -> None:
    """Read one SSE stream to `[DONE]`. Raises Dsv4Error when it breaks off, reports an error or counts nothing."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            if not record.num_output_tokens:
                raise Dsv4Error("the stream has no usage, so its tokens cannot be counted")
            return
        event = orjson.loads(data)
        if error := event.get("error"):
            raise Dsv4Error(f"error in the stream: {str(error.get('message', error))[:300]}")
        if usage := event.get("usage"):
            record.num_input_tokens = usage["prompt_tokens"]
            record.num_output_tokens = usage["completion_tokens"]
        if event.get("choices"):
            _note_chunk(record, event["choices"][0])
    raise Dsv4Error("the stream ended without [DONE]")


def _note_chunk(record: RequestRecord, choice: dict[str, Any]) -> None:
    now = time.perf_counter()
    if not record.first_s:
        record.first_s = now
    elif choice.get("text") or not choice.get("finish_reason"):  # a bare closing chunk is no token
        record.gaps_s.append(now - record.last_s)
    record.last_s = now
