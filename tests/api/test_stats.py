"""GET /stats and the samples behind it."""

import asyncio
import time
from dataclasses import dataclass

import msgspec
import pytest
from support.api import INFO, STATS

from dsv4serve.api.live import STALE_S, Live, quantile
from dsv4serve.engine.messages import EngineStats
from dsv4serve.obs.metrics import ITL, LOOP_LAG, TTFT, FrontendMetrics
from dsv4serve.types import EngineUnavailable


@dataclass
class Source:
    stats_now: EngineStats = STATS
    info: object = INFO
    is_ready: bool = True

    async def stats(self) -> EngineStats:
        if not self.is_ready:
            raise EngineUnavailable("none")
        return self.stats_now


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(source, clock) -> Live:
    return Live(source, FrontendMetrics(), clock)


def step(live, source, clock, seconds, **numbers):
    clock.now += seconds
    source.stats_now = msgspec.structs.replace(source.stats_now, **numbers)
    asyncio.run(live.refresh())


def test_the_route_has_what_its_docstring_says(serve):
    server = serve(api_key=("secret",))
    assert server.client.get("/stats").status_code == 401
    server.client.headers["Authorization"] = "Bearer secret"
    server.say("</think>one two three")
    server.client.get("/stats")
    assert server.chat().status_code == 200
    body = server.client.get("/stats").json()
    assert {name: body.pop(name) for name in ("running", "queued", "slots", "pages", "tails")} == {
        "running": 1,
        "queued": 2,
        "slots": {"used": 1, "total": 4},
        "pages": {"used": 4, "cached": 10, "total": 64},
        "tails": {"used": 0, "cached": 1, "total": 4},
    }
    assert 0 < body["ttft_s"]["p50"] <= body["ttft_s"]["p95"]
    assert 0 < body["itl_s"]["p50"] <= body["itl_s"]["p95"]
    assert body["itl_s"]["p95"] <= body["itl_s"]["max"]
    del body["ttft_s"], body["itl_s"]
    assert body == {
        "engine_ready": True,
        "prompt_tokens_per_s": 0.0,
        "generated_tokens_per_s": 0.0,
        "event_loop_lag_s": None,  # nobody watches the loop of the tests' server
        "prefix_hit_rate": None,
        "acceptance": None,  # no draft between the two samples
    }


def test_acceptance_is_that_of_the_drafts_of_the_last_minute(live, source, clock):
    step(live, source, clock, 0, num_verifies=1000, num_drafted=[1000, 900], num_accepted=[0, 0])
    assert live.acceptance() is None
    step(live, source, clock, 70, num_verifies=1010, num_drafted=[1010, 900], num_accepted=[5, 0])
    step(live, source, clock, 10, num_verifies=1030, num_drafted=[1030, 920], num_accepted=[21, 8])
    assert live.report()["acceptance"] == {
        "accept_rate": 24 / 40,
        "accept_length": 1 + 24 / 20,
        "by_position": [16 / 20, 8 / 20],
        "is_low": False,
    }
    step(
        live,
        source,
        clock,
        55,
        num_verifies=1034,
        num_drafted=[1034, 920],
        num_accepted=[22, 8],
        is_accept_rate_low=True,
    )
    report = live.report()["acceptance"]
    assert (report["by_position"], report["is_low"]) == ([1 / 4, None], True)


def test_rates_are_of_the_last_ten_seconds_and_hits_of_the_last_minute(live, source, clock):
    step(live, source, clock, 0)
    step(live, source, clock, 30, num_prompt_tokens=1100, num_cached_tokens=800, num_generated_tokens=900)
    step(live, source, clock, 5, num_prompt_tokens=1150, num_generated_tokens=1000)
    assert live.tokens_per_s() == (10, 20)
    assert live.prefix_hit_rate() == pytest.approx(300 / 450)
    step(live, source, clock, 40)
    assert live.tokens_per_s() == (0, 0)
    assert live.prefix_hit_rate() == 0
    step(live, source, clock, 100)
    assert live.prefix_hit_rate() is None


def test_a_restarted_engine_counts_from_zero(live, source, clock):
    step(live, source, clock, 0)
    step(live, source, clock, 2, num_steps=1, num_prompt_tokens=10, num_cached_tokens=0, num_generated_tokens=1)
    assert live.tokens_per_s() == (0, 0)
    step(live, source, clock, 2, num_steps=3, num_generated_tokens=5)
    assert live.tokens_per_s() == (0, 2)


def test_an_engine_that_is_gone_or_silent_has_no_numbers(live, source, clock):
    step(live, source, clock, 0)
    assert live.engine_stats == STATS
    source.is_ready = False
    assert live.engine_stats is None
    step(live, source, clock, 5)
    assert live.report()["engine_ready"] is False
    assert live.report()["running"] is live.report()["pages"] is None
    source.is_ready = True
    clock.now += STALE_S
    assert live.engine_stats is None


def test_latencies_are_of_the_last_minute(live, source, clock):
    metrics = live._metrics
    metrics.ttft.observe(100)
    step(live, source, clock, 0)
    assert live.latency(TTFT) is live.latency(ITL) is None
    for seconds in (0.012, 0.012, 0.012, 0.4):
        metrics.ttft.observe(seconds)
    found = live.latency(TTFT)
    assert 0.01 < found["p50"] < 0.02
    assert 0.3 < found["p95"] < 0.5
    for _ in range(15):
        step(live, source, clock, 6)
    assert live.latency(TTFT) is None


def test_what_blocks_the_event_loop_is_seen(live, source, clock):
    step(live, source, clock, 0)

    async def run() -> None:
        watcher = asyncio.create_task(live.watch_loop())
        await asyncio.sleep(0)
        time.sleep(0.2)
        await asyncio.sleep(0.05)
        watcher.cancel()

    asyncio.run(run())
    assert live.latency(LOOP_LAG)["max"] >= 0.19


def test_one_sample_that_fails_does_not_end_the_sampling(live, source, monkeypatch):
    monkeypatch.setattr("dsv4serve.api.live.SAMPLE_S", 0.01)

    answers = iter([OSError("half a file"), STATS])

    async def answer() -> EngineStats:
        if isinstance(found := next(answers), Exception):
            raise found
        return found

    monkeypatch.setattr(source, "stats", answer)

    async def run() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await live.run()

    asyncio.run(run())
    assert live.engine_stats == STATS


def test_quantiles_are_linear_within_a_bucket():
    counts = {1.0: 0, 2.0: 10, 4.0: 20, float("inf"): 20}
    assert quantile(counts, 0.5) == 2.0
    assert quantile(counts, 0.25) == 1.5
    assert quantile(counts, 0.75) == 3.0
    assert quantile({1.0: 0, float("inf"): 5}, 0.5) == 1.0
