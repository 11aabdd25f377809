"""The engine's numbers as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from dsv4serve.api.live import Live
from dsv4serve.engine.messages import EngineInfo, EngineStats
from dsv4serve.obs.metrics import PREFIX


def engine_metrics(live: Live, info: EngineInfo | None) -> Iterator[Metric]:
    """All metrics of the engine; without one that answers only engine_up, which is then 0."""
    stats = live.engine_stats
    up = stats is not None and info is not None
    yield _gauge("engine_up", "1 while the engine answers", int(up))
    if stats is None or info is None:
        return
    yield from _gauges(stats, info)
    # In words of the field: rates over a window that is this server's, not Prometheus'.
    yield _gauge("gen_throughput", "tokens generated per second, over 10 s", live.tokens_per_s()[1])
    yield _gauge(
        "cache_hit_rate", "share of prompt tokens found in the prefix cache, over 60 s", live.prefix_hit_rate() or 0.0
    )
    yield from _counters(stats)
    yield from _speculation(live, stats)
    yield from _start_up(stats)
    steps = HistogramMetricFamily(PREFIX + "step_time_seconds", "time of a step, by phase", labels=("phase",))
    for phase, histogram in stats.step_times.items():
        steps.add_metric((phase,), histogram.cumulative(), histogram.sum)
    yield steps


def _gauges(stats: EngineStats, info: EngineInfo) -> Iterator[Metric]:
    used_pages = info.num_pages - stats.num_free_pages
    yield _gauge("num_running_reqs", "requests that hold a slot", stats.num_running)
    yield _gauge("num_queue_reqs", "requests that wait for a slot", stats.num_waiting)
    yield _gauge("num_retracted_reqs", "of these, requests that ran before and were retracted", stats.num_retracted)
    yield _gauge("token_usage", "share of all pages that requests hold", used_pages / info.num_pages)
    yield _gauge("num_slots", "slots", info.num_slots)
    yield _gauge("num_used_slots", "slots that requests hold", info.num_slots - stats.num_free_slots)
    yield _gauge("num_pages", "pages", info.num_pages)
    yield _gauge("num_used_pages", "pages that requests hold", used_pages)
    yield _gauge("num_cached_pages", "pages that only the prefix cache holds", stats.num_cached_pages)
    yield _gauge("num_tails", "tails", info.num_tails)
    yield _gauge("num_used_tails", "tails that requests hold", info.num_tails - stats.num_free_tails)
    yield _gauge("num_cached_tails", "tails that the prefix cache holds", stats.num_cached_tails)


def _counters(stats: EngineStats) -> Iterator[Metric]:
    num_prompt = stats.num_prompt_tokens + stats.num_cached_tokens
    yield _counter("prompt_tokens", "prompt tokens, cached ones too; again after a retraction", num_prompt)
    yield _counter("cached_tokens", "prompt tokens found in the prefix cache", stats.num_cached_tokens)
    yield _counter("generation_tokens", "tokens generated", stats.num_generated_tokens)
    yield _counter("steps", "steps", stats.num_steps)
    yield _counter("prefix_hits", "starts of requests that found a prefix in the cache", stats.num_prefix_hits)
    yield _counter("evicted_pages", "pages that left the prefix cache", stats.num_evicted_pages)
    yield _counter("evicted_tails", "tails that left the prefix cache", stats.num_evicted_tails)
    yield _counter("retractions", "times that a request had to give back its pages", stats.num_retractions)


def _speculation(live: Live, stats: EngineStats) -> Iterator[Metric]:
    acceptance = live.acceptance()
    rate, length = (0.0, 0.0) if acceptance is None else (acceptance.accept_rate, acceptance.accept_length)
    yield _gauge("spec_accept_rate", "share of drafts that were accepted, over 60 s", rate)
    yield _gauge("spec_accept_length", "tokens per verify, the one after the drafts too, over 60 s", length)
    yield _gauge(
        "spec_accept_low", "1 while first drafts are accepted far less often than before", stats.is_accept_rate_low
    )
    yield _counter("spec_accept_alarms", "times that this began", stats.num_accept_alarms)
    yield _counter("spec_verifies", "decodes of a request with drafts", stats.num_verifies)
    drafted = CounterMetricFamily(PREFIX + "spec_draft_tokens", "drafts verified, by position", labels=("position",))
    accepted = CounterMetricFamily(
        PREFIX + "spec_accepted_tokens", "drafts accepted, by position", labels=("position",)
    )
    for family, counts in ((drafted, stats.num_drafted), (accepted, stats.num_accepted)):
        for position, count in enumerate(counts, start=1):
            family.add_metric((str(position),), count)
        yield family
    yield _counter("spec_nonfinite_drafts", "drafts with NaN or infinite logits", stats.num_nonfinite_drafts)
    yield _counter(
        "nonfinite_steps", "steps in which --check-numerics found NaN or infinity", stats.num_nonfinite_steps
    )
    yield _counter("shadow_rows", "rows compared with the reference kernels", stats.num_shadow_rows)
    yield _counter("shadow_flips", "of these, rows with another best token", stats.num_shadow_flips)
    yield _gauge(
        "shadow_drift", "norm of the logits' difference / norm of the reference's, last time", stats.shadow_drift
    )


def _start_up(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("ready_seconds", "from the start of the engine's process until it could serve", stats.ready_s)
    for name, text in (
        ("compiled", "kernels compiled; while the engine serves there should be none"),
        ("loaded", "kernels loaded from the cache on disk; while the engine serves there should be none"),
    ):
        family = CounterMetricFamily(f"{PREFIX}kernels_{name}", text, labels=("phase",))
        for phase, counts in stats.kernels.items():
            family.add_metric((phase,), getattr(counts, name))
        yield family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value)


def _counter(name: str, text: str, value: int) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value)
