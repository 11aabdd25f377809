"""Allocates Pro's cache for requests of 9K tokens in 60 GB on a GPU: how many fit, here and by SGLang's sizing.

python3 benchmarks/cache_fit.py $OUT/cache-fit.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from gpu_models import whole_config
from interactivity import day0_requests, requests_that_fit

from dsv4serve.cli.record import append_record, make_record
from dsv4serve.config import ModelConfig, Numerics
from dsv4serve.memory import CacheLayout, CachePools, plan_capacity
from dsv4serve.types import PAGE_TOKENS

CACHE_BYTES, NUM_TOKENS = 60 * 10**9, 9216


def main() -> None:
    model = ModelConfig.from_dict(whole_config("pro"))
    layout = CacheLayout.build(model, Numerics.OFFICIAL)
    requests = requests_that_fit(layout, CACHE_BYTES, NUM_TOKENS)
    plan = plan_capacity(layout, CACHE_BYTES, requests, NUM_TOKENS)
    before = torch.cuda.memory_allocated()
    pools = CachePools(layout, plan.num_slots, plan.num_pages, plan.num_tails, "cuda")
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated() - before
    pages = -(-NUM_TOKENS // PAGE_TOKENS)
    assert pools.num_pages >= requests * pages
    results = {
        "requests": requests,
        "allocated_bytes": allocated,
        "day0_requests": day0_requests(model, CACHE_BYTES, NUM_TOKENS),
    }
    settings = {"model": "pro", "cache_bytes": CACHE_BYTES, "num_tokens": NUM_TOKENS}
    append_record(Path(sys.argv[1]), make_record(sys.argv, "", settings, results))
    print(settings, results)


if __name__ == "__main__":
    main()
