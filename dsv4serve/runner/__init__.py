"""SchedulerOutput to sampled tokens: slot state, ragged batch, model, sampler."""

from dsv4serve.runner.build import build_runner, cache_plan
from dsv4serve.runner.runner import Runner

__all__ = ["Runner", "build_runner", "cache_plan"]
