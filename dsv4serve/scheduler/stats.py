"""Counters and gauges of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass


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
    num_finished: int = 0
