"""Decode on CPU, one thread: Hugging Face transformers against this engine, same weights, in one run.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/cpu_vs_transformers.py

transformers: the BF16 export of the checkpoint loaded as float32, eager attention, KV cache, a bare greedy loop.
runner: this engine's runner driven with hand-made steps; server: the real processes over HTTP; both numerics exact.
Rounds alternate between the systems; the median of the rounds is reported, so that a busy moment hits all of them.
Rates are output tokens per second of all streams together, prompts not counted (server: streams / mean TPOT).
"""

import argparse
import asyncio
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx
import torch
from transformers import AutoModelForCausalLM

from dsv4serve.cli import load
from dsv4serve.cli.record import append_record, make_record
from dsv4serve.config import EngineConfig, Numerics, default_model
from dsv4serve.runner import Runner, build_runner
from dsv4serve.types import PAGE_TOKENS, Chunk, PageAppend, SamplingParams, SchedulerOutput, SlotStart

OUT = Path(__file__).parent / "results/cpu-vs-transformers.jsonl"
CLI = (sys.executable, "-m", "dsv4serve.cli.main")


def transformers_rate(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> float:
    with torch.inference_mode():
        step = model(torch.tensor([prompt]), use_cache=True)
        started = time.perf_counter()
        for _ in range(num_tokens):
            token = step.logits[:, -1:].argmax(-1)
            step = model(token, past_key_values=step.past_key_values, use_cache=True)
        return num_tokens / (time.perf_counter() - started)


def runner_rate(runner: Runner, prompts: list[list[int]], num_tokens: int) -> float:
    """One slot with pages of its own for each prompt; then all decode together."""
    num_pages = -(-(len(prompts[0]) + num_tokens + 1) // PAGE_TOKENS)
    greedy = SamplingParams(max_tokens=num_tokens + 1, temperature=0.0, ignore_eos=True)
    slots = list(range(len(prompts)))
    for slot, prompt in enumerate(prompts):
        start = SlotStart(slot=slot, request_id=str(slot), sampling=greedy, num_prompt_tokens=len(prompt))
        pages = PageAppend(slot, list(range(slot * num_pages, (slot + 1) * num_pages)))
        chunk = Chunk(slot=slot, token_ids=prompt, samples=True)
        runner.execute(SchedulerOutput(step_id=0, starts=[start], page_appends=[pages], chunks=[chunk]))
    started = time.perf_counter()
    for step in range(num_tokens):
        runner.execute(SchedulerOutput(step_id=step + 1, decodes=slots))
    return len(prompts) * num_tokens / (time.perf_counter() - started)


@contextmanager
def server(model: Path) -> Iterator[str]:
    """The real processes on a free port; yields the address."""
    command = [*CLI, "launch", "--model", str(model), "--numerics", "exact", "--threads", "1", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if ready := re.search(r"ready on (http\S+)", line):
                    yield ready[1]
                    break
            else:
                raise SystemExit("the server did not become ready; its messages are above")
        finally:
            process.terminate()


async def server_rate(url: str, settings: load.LoadSettings) -> float:
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, trust_env=False) as client:
        results = load.summarize(await load.run_load(client, settings, lambda record: None))
    if results["num_failed"]:
        raise SystemExit(f"requests failed: {results['failures']}")
    return settings.concurrency * 1000 / float(results["tpot_ms"]["mean"])


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Rates of every system, one value a round."""
    torch.set_num_threads(1)
    config = EngineConfig(model=args.model, numerics=Numerics.EXACT, max_running_requests=16)
    runner = build_runner(config)
    draw = random.Random(0)
    prompts = [draw.choices(range(100, runner.vocab_size), k=args.prompt_tokens) for _ in range(16)]
    with tempfile.TemporaryDirectory() as export, server(args.model) as url:
        subprocess.run([*CLI, "convert", str(args.model), export, "--to", "bf16"], check=True)
        hugging = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, attn_implementation="eager").eval()

        def served(concurrency: int) -> float:
            settings = load.LoadSettings(
                model=args.model.resolve().name,
                concurrency=concurrency,
                num_requests=concurrency * 2,
                num_warmup=concurrency,
                input_tokens=args.prompt_tokens,
                output_tokens=args.output_tokens,
                random_range_ratio=1.0,
                vocab_size=runner.vocab_size,
                seed=0,
            )
            return asyncio.run(server_rate(url, settings))

        systems: dict[str, Callable[[], float]] = {
            "transformers_1": lambda: transformers_rate(hugging, prompts[0], args.output_tokens),
            "runner_1": lambda: runner_rate(runner, prompts[:1], args.output_tokens),
            "runner_16": lambda: runner_rate(runner, prompts, args.output_tokens),
            "server_1": lambda: served(1),
            "server_16": lambda: served(16),
        }
        for name in ("transformers_1", "runner_1"):  # first calls are slow
            systems[name]()
        rates: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(args.rounds):
            for name, run in systems.items():
                rates[name].append(round(run(), 2))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=default_model(), help="checkpoint (default the embedded one)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens (default %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=128, help="tokens (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds, of which the median counts (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="JSONL file (default %(default)s)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # for the server's processes
    rates = measure(args)
    rate = {name: median(values) for name, values in rates.items()}
    results = {
        "unit": "output tokens/s, median of rounds",
        **rate,
        "runner_1_over_transformers_1": round(rate["runner_1"] / rate["transformers_1"], 2),
        "server_1_over_transformers_1": round(rate["server_1"] / rate["transformers_1"], 2),
        "runner_16_over_runner_1": round(rate["runner_16"] / rate["runner_1"], 2),
        "server_16_over_server_1": round(rate["server_16"] / rate["server_1"], 2),
        "rounds": rates,
    }
    settings = {
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "numerics": "exact",
        "threads": 1,
    }
    append_record(args.out, make_record(sys.argv, "", settings, results))
    for name, value in results.items():
        print(f"{name:30} {value}")


if __name__ == "__main__":
    main()
