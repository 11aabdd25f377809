"""How the whole server has been doing over the last minute: regular samples of the engine's and the frontends' numbers.

Every frontend samples for itself and sees the whole: the engine counts everybody's tokens, and the frontends share
their histograms (dsv4serve.obs.metrics).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from dsv4serve.engine.messages import EngineInfo, EngineStats
from dsv4serve.obs.metrics import ITL, LOOP_LAG, TTFT, FrontendMetrics
from dsv4serve.types import EngineUnavailable

logger = logging.getLogger(__name__)

WINDOW_S = 60.0
RATE_WINDOW_S = 10.0
SAMPLE_S = 1.0
LATENCY_SAMPLE_S = 5.0  # reading all frontends' histograms takes milliseconds
WAIT_S = 1.0  # for the engine's answer, when somebody asks and the last sample is old
LAG_SLEEP_S = 0.01
STALE_S = 30.0  # a sample of an engine that does not answer says nothing after that time

Buckets = dict[float, float]  # upper bound -> observations up to it


class Sample(NamedTuple):
    """The engine's numbers at a time of the clock."""

    time: float
    stats: EngineStats


class Acceptance(NamedTuple):
    """How drafts did."""

    accept_rate: float  # accepted drafts / all drafts
    accept_length: float  # tokens of a verify: the accepted drafts and the one after them
    by_position: list[float | None]  # share of the first, second, .. drafts that were accepted; None without any
    is_low: bool  # an alarm is on: first drafts are accepted much less often than they were


class StatsSource(Protocol):
    """The part of the engine client that is sampled."""

    info: EngineInfo | None

    @property
    def is_ready(self) -> bool:
        """Whether there is an engine."""

    async def stats(self) -> EngineStats:
        """The engine's numbers. Raises EngineUnavailable."""


class Live:
    """Samples, and what follows from them."""

    def __init__(
        self, engine: StatsSource, metrics: FrontendMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine, self._metrics, self._clock = engine, metrics, clock
        self._samples: deque[Sample] = deque()
        self._latencies: deque[tuple[float, dict[str, Buckets]]] = deque()

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            try:
                await self.refresh()
            except Exception:  # another frontend's file, half written: the next sample is a second away
                logger.warning("a sample of the metrics failed", exc_info=True)
            await asyncio.sleep(SAMPLE_S)

    async def watch_loop(self) -> None:
        """Measure until cancelled how late the event loop is: whatever holds it up is in the way of all streams."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(LAG_SLEEP_S)
            self._metrics.loop_lag.observe(max(0.0, time.perf_counter() - before - LAG_SLEEP_S))

    async def refresh(self) -> None:
        """Take samples unless there are fresh ones. Waits at most WAIT_S for the engine."""
        now = self._clock()
        if not self._samples or now - self._samples[-1].time >= SAMPLE_S / 2:
            with contextlib.suppress(EngineUnavailable, TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    self._add(Sample(now, await self._engine.stats()))
        if not self._latencies or now - self._latencies[-1][0] >= LATENCY_SAMPLE_S:
            self._latencies.append((now, self._buckets()))
            while now - self._latencies[0][0] > WINDOW_S:
                self._latencies.popleft()

    @property
    def engine_stats(self) -> EngineStats | None:
        """The engine's last numbers; None when there is no engine or it has been silent for long."""
        if not self._engine.is_ready or not self._samples or self._clock() - self._samples[-1].time > STALE_S:
            return None
        return self._samples[-1].stats

    def tokens_per_s(self) -> tuple[float, float]:
        """Prompt tokens computed and tokens generated per second, over the last RATE_WINDOW_S."""
        first, last = self._first_within(RATE_WINDOW_S), self._samples[-1] if self._samples else None
        if first is None or last is None or last.time <= first.time:
            return 0.0, 0.0
        seconds = last.time - first.time
        prompt = last.stats.num_prompt_tokens - first.stats.num_prompt_tokens
        return prompt / seconds, (last.stats.num_generated_tokens - first.stats.num_generated_tokens) / seconds

    def prefix_hit_rate(self) -> float | None:
        """Share of the prompt tokens of the last minute that the prefix cache had; None when there were none."""
        first = self._first_within(WINDOW_S)
        if first is None:
            return None
        last = self._samples[-1].stats
        cached = last.num_cached_tokens - first.stats.num_cached_tokens
        computed = last.num_prompt_tokens - first.stats.num_prompt_tokens
        return cached / (cached + computed) if cached + computed else None

    def acceptance(self) -> Acceptance | None:
        """How drafts did in the last minute; None when none was verified."""
        first = self._first_within(WINDOW_S)
        if first is None:
            return None
        now, then = self._samples[-1].stats, first.stats
        num_verifies = now.num_verifies - then.num_verifies
        if not num_verifies:
            return None
        drafted = [b - a for a, b in zip(then.num_drafted, now.num_drafted, strict=True)]
        accepted = [b - a for a, b in zip(then.num_accepted, now.num_accepted, strict=True)]
        return Acceptance(
            accept_rate=sum(accepted) / sum(drafted),
            accept_length=1 + sum(accepted) / num_verifies,
            by_position=[right / num if num else None for right, num in zip(accepted, drafted, strict=True)],
            is_low=now.is_accept_rate_low,
        )

    def latency(self, name: str) -> dict[str, float] | None:
        """p50, p95 and max, in seconds, of the histogram `name` over the last minute; None without observations."""
        if not self._latencies:
            return None
        now, first = self._buckets()[name], self._latencies[0][1][name]
        counts = {bound: count - first.get(bound, 0.0) for bound, count in now.items()}
        if not counts or counts[max(counts)] <= 0:
            return None
        return {"p50": quantile(counts, 0.5), "p95": quantile(counts, 0.95), "max": quantile(counts, 1.0)}

    def report(self) -> dict[str, Any]:
        """The body of GET /stats, see there."""
        stats, info = self.engine_stats, self._engine.info
        body: dict[str, Any] = {
            "engine_ready": stats is not None,
            "running": stats and stats.num_running,
            "queued": stats and stats.num_waiting,
            "prompt_tokens_per_s": None,
            "generated_tokens_per_s": None,
            "ttft_s": self.latency(TTFT),
            "itl_s": self.latency(ITL),
            "event_loop_lag_s": self.latency(LOOP_LAG),
            "slots": None,
            "pages": None,
            "tails": None,
            "prefix_hit_rate": None,
            "acceptance": None,
        }
        if stats is not None and info is not None:
            body["prompt_tokens_per_s"], body["generated_tokens_per_s"] = self.tokens_per_s()
            body["slots"] = {"used": info.num_slots - stats.num_free_slots, "total": info.num_slots}
            body["pages"] = _usage(info.num_pages, stats.num_free_pages, stats.num_cached_pages)
            body["tails"] = _usage(info.num_tails, stats.num_free_tails, stats.num_cached_tails)
            body["prefix_hit_rate"] = self.prefix_hit_rate()
            acceptance = self.acceptance()
            if acceptance is not None:
                body["acceptance"] = acceptance._asdict()
        return body

    def _add(self, sample: Sample) -> None:
        if self._samples and sample.stats.num_steps < self._samples[-1].stats.num_steps:
            self._samples.clear()  # another engine, which counts from zero
        self._samples.append(sample)
        while sample.time - self._samples[0].time > WINDOW_S:
            self._samples.popleft()

    def _first_within(self, seconds: float) -> Sample | None:
        now = self._clock()
        return next((sample for sample in self._samples if now - sample.time <= seconds), None)

    def _buckets(self) -> dict[str, Buckets]:
        found: dict[str, Buckets] = {TTFT: {}, ITL: {}, LOOP_LAG: {}}
        for metric in self._metrics.collect():
            if metric.name in found:
                buckets = [item for item in metric.samples if item.name.endswith("_bucket")]
                found[metric.name] = {float(item.labels["le"]): item.value for item in buckets}
        return found


def quantile(counts: Buckets, share: float) -> float:
    """The value below which `share` of the observations lie, linear within a bucket; at most the last finite bound.

    `counts`: upper bound -> observations up to it, at least one in all.
    """
    rank, low, below = share * counts[max(counts)], 0.0, 0.0
    for bound in sorted(counts):
        if counts[bound] >= rank and counts[bound] > below:
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / (counts[bound] - below)
        low, below = bound, counts[bound]
    raise ValueError("the counts fall")


def _usage(total: int, num_free: int, num_cached: int) -> dict[str, int]:
    """`num_free` includes what only the prefix cache holds."""
    return {"used": total - num_free, "cached": num_cached, "total": total}
