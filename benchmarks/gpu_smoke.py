"""Does the device engine work on this GPU, and how fast does it decode? Ends with an error if something is wrong.

1. The demo checkpoint's greedy answers to held-out probes of the quality set are those of the CPU engine with official
   numerics on the same history. The rule for near ties: a token may differ where the CPU's logits prefer their own by
   at most NEAR_TIE.
2. A replayed graph has the bits of the eager step: tokens, logits and cache.
3. Decode tokens/s at batch 1, 16 and 64 of the demo and of a slice of Pro: steps one ahead of the host, and graph alone.

On the GPU machine, from a checkout, wheels of what is missing there in .whl (pydantic pydantic-core pydantic-settings
annotated-types typing-inspection python-dotenv msgspec orjson pyzmq jsonschema and its own), one command, tests first, below 10 minutes:

    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl;
    mkdir -p /tmp/site && ln -sfn "$PWD/kernels" /tmp/site/dsv4_kernels && ln -sfn "$PWD/configs" /tmp/site/dsv4serve_configs;
    export PYTHONPATH="/tmp/site:$PWD" PYTHONUNBUFFERED=1;
    timeout 200 python3 -m pytest --confcutdir=tests/gpu -p no:cacheprovider tests/gpu/test_engine_gpu.py;
    timeout 250 python3 benchmarks/gpu_smoke.py $OUT/gpu-smoke.jsonl;
    timeout 120 python3 benchmarks/step.py $OUT/gpu-step.jsonl

and, with the same first three lines, each in a call of its own:

    timeout 230 python3 benchmarks/ablation.py $OUT/ablation.jsonl --seconds 190
    timeout 500 python3 benchmarks/early_launches.py $OUT/early-launches.jsonl
"""  # noqa: E501

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gpu_models import Driver, build
from support.device_engine import NEAR_TIE, check_replay, regrets
from support.models import oracle_logits

from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.cli.record import append_record, make_record
from dsv4serve.config import EngineConfig, ModelConfig, Numerics, default_model
from dsv4serve.model.transformer import Transformer
from dsv4serve.runner.graphs import bucket_for
from dsv4serve.types import PAGE_TOKENS
from dsv4serve.weights import load_weights
from tools.demo_model.offline import prompt_ids
from tools.demo_model.probing import held_out

BATCHES = (1, 16, 64)
SUITES = ("stories", "arithmetic", "tools", "json", "recall 1,000")  # what needs no table of facts
NUM_TOKENS = 32  # of an answer, at most
NUM_STEPS = 50
CACHE_BYTES = 2 << 30  # small: comparing a graph with the eager step takes copies of all of it
CONTEXT = 1024  # tokens before the decodes that are timed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSONL file")
    parser.add_argument("--models", nargs="*", default=["demo", "pro-slice"], help="what to time")
    args = parser.parse_args(argv)
    failed = False
    for name in args.models:
        driver = build(name, max_running_requests=max(BATCHES), max_model_len=4096, max_step_tokens=1024,
                       cache_bytes=CACHE_BYTES)  # fmt: skip
        results: dict[str, Any] = {"start_s": round(driver.start_s, 1)}
        if name == "demo":
            results |= greedy_tokens(driver)
        results["decode"] = [decode_rate(driver, batch) for batch in BATCHES]
        check_replay(driver.runner, bucket_for([1] * BATCHES[-1], driver.runner.num_slots))
        results |= {"replay_equals_eager": True, "allocated_bytes": torch.cuda.max_memory_allocated()}
        append_record(args.out, make_record(sys.argv, "", {"model": name, "context": CONTEXT}, results))
        print(name, results)
        del driver
        gc.collect()
        torch.cuda.empty_cache()
        failed |= "failure" in results
    return int(failed)


def greedy_tokens(driver: Driver) -> dict[str, Any]:
    """Answers against the CPU engine's logits; a difference that is no near tie makes `failure`."""
    config = EngineConfig(model=default_model())
    model = ModelConfig.load(config.model)
    reference = Transformer(model, load_weights(config, model), Numerics.OFFICIAL)
    tokenizer = ChatTokenizer(config.model)
    num_equal, num_tokens, lost = 0, 0, []
    for suite in SUITES:
        for probe in held_out(suite, 1):
            prompt = prompt_ids(tokenizer, probe)
            tokens = driver.generate(prompt, NUM_TOKENS, model.eos_token_id)
            expected = oracle_logits(reference, prompt + tokens[:-1])[len(prompt) - 1 :]
            num_equal += int((expected.argmax(-1) == torch.tensor(tokens)).sum())
            num_tokens += len(tokens)
            lost.append(float(regrets(expected, tokens).max()))
    print(f"{num_equal} of {num_tokens} tokens equal; regrets {sorted(lost)[-8:]}")
    results = {"num_tokens": num_tokens, "num_equal": num_equal, "worst_regret": round(max(lost), 4)}
    if max(lost) > NEAR_TIE:
        results["failure"] = f"a greedy token is {max(lost):.3f} below the CPU engine's best; allowed is {NEAR_TIE}"
    return results


def decode_rate(driver: Driver, batch: int) -> dict[str, Any]:
    """Tokens per second of steps of `batch` decodes."""
    context = min(CONTEXT, driver.longest - PAGE_TOKENS)
    slots = list(range(batch))
    for slot in slots:
        driver.begin(slot, [3 + 17 * slot], context)
    step_ms = driver.decode_ms(slots, NUM_STEPS)
    return {
        "batch": batch,
        "step_ms": round(step_ms, 3),
        "graph_ms": round(_graph_ms(driver, batch), 3),
        "tokens_per_s": round(batch / step_ms * 1e3, 1),
    }


def _graph_ms(driver: Driver, batch: int) -> float:
    """Device time of the last step's graph, replayed without the host between; its positions stay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graphs, bucket = driver.runner.graphs, bucket_for([1] * batch, driver.runner.num_slots)
    start.record()
    with torch.inference_mode():
        for _ in range(NUM_STEPS):
            graphs.replay(bucket)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / NUM_STEPS


if __name__ == "__main__":
    sys.exit(main())
