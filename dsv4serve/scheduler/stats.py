"""Counters and gauges of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SchedulerStats:
    """Counters grow from start; gauges are as of the call."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_slots: int = 0
    num_free_pages: int = 0  # free, or held by nothing but the prefix cache; tails too
    num_free_tails: int = 0
    num_cached_pages: int = 0  # held by nothing but the prefix cache
    num_cached_tails: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0  # prefilled, cached ones not counted, again after a retraction
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_retractions: int = 0
    num_retracted: int = 0  # that wait now because they were retracted
    num_prefix_hits: int = 0  # starts of requests that found a prefix in the cache
    num_evicted_pages: int = 0  # from the prefix cache; tails too
    num_evicted_tails: int = 0
    num_finished: int = 0
    num_verifies: int = 0  # decodes with drafts
    num_drafted: list[int] = field(default_factory=list)  # by place of the draft: how many were verified
    num_accepted: list[int] = field(default_factory=list)  # and how many of them accepted
