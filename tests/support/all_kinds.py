"""Requests of all kinds that a runner treats differently.

    PYTHONPATH=tests python -m support.all_kinds '{"device": "cuda", "num_draft_tokens": 2}'

serves some of them in a process of its own, with the demo checkpoint and these settings of EngineConfig, and prints as
JSON what `obs.kernels` counted and how many tokens came.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

from support.engine import greedy
from support.models import random_ids

from dsv4serve.config import Device, EngineConfig, ModelConfig, default_model
from dsv4serve.engine.pipeline import Pipeline
from dsv4serve.engine.process import build_scheduler
from dsv4serve.obs.kernels import kernels
from dsv4serve.runner import build_runner
from dsv4serve.types import Request

KINDS = (
    {},
    {"return_logits": True},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "seed": 5},
    {"temperature": 1.0, "seed": 6, "is_repeatable": True},
    {"repetition_penalty": 1.1, "logit_bias": {3: 1.0}, "bad_words": ((5, 6), (7,))},
    {"num_logprobs": 5, "min_tokens": 2},
    {"num_prompt_logprobs": 3},
    {"num_prompt_logits": 70},
)


def crowd(config: ModelConfig, num_requests: int, draw: random.Random) -> list[Request]:
    """Requests of all kinds and lengths; a third of them go on where another one's prompt ends."""
    requests = []
    for number in range(num_requests):
        ids = random_ids(config, draw.choice([1, 2, 17, 40, 130, 256, 300, 700]), number)
        if number % 3 == 2:
            ids = requests[number - 1].prompt_ids + ids[:20]
        settings = {"return_logits": False, **KINDS[number % len(KINDS)]}
        requests.append(greedy(f"r{number}", ids, draw.randint(1, 12), **settings))
    return requests


def serve(settings: dict[str, Any]) -> dict[str, Any]:
    """What the counter says after an engine with these settings has served a crowd that arrives one by one."""
    settings = {"max_running_requests": 12, "max_model_len": 2048, "cache_bytes": 256 << 20} | settings
    config = EngineConfig(model=default_model(), **settings | {"device": Device(settings["device"])})
    runner = build_runner(config)
    scheduler = build_scheduler(config, runner)
    pipeline = Pipeline(scheduler, runner)
    requests, num_tokens = crowd(ModelConfig.load(config.model), 32, random.Random(0)), 0
    while requests or pipeline.has_work:
        if requests:
            scheduler.add(requests.pop())
        step = pipeline.step()
        if step is not None:
            num_tokens += sum(len(output.token_ids) for output in scheduler.update(step.planned, step.result))
    runner.shutdown()
    phases = {phase: {"compiled": made.compiled, "loaded": made.loaded} for phase, made in kernels.phases.items()}
    return {
        "ready_s": kernels.ready_s,
        "num_tokens": num_tokens,
        "num_verifies": scheduler.stats().num_verifies,
        **phases,
    }


if __name__ == "__main__":
    print(json.dumps(serve(json.loads(sys.argv[1]))))
