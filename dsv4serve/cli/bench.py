"""`dsv4serve bench`: load a running server in a closed loop and measure it (definitions: `load.py`)."""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsv4serve.cli import load
from dsv4serve.cli.record import append_record, make_record
from dsv4serve.types import Dsv4Error

DESCRIPTION = """\
Keep CONCURRENCY streaming requests open against a running OpenAI-compatible server until NUM_REQUESTS ended.
Prompts are random token ids sent to /v1/completions, outputs have a fixed length (ignore_eos).

TTFT   ms from sending a request to its first chunk        ITL   ms between successive chunks
TPOT   ms (last - first chunk) / (output tokens - 1)       e2e   ms from sending to the end of the stream
interactivity   tokens/s of one user = 1000 / p50 of TPOT; TTFT is not in it
throughput      tokens counted by the server (usage) / time from the first request to the last end

Exits 1 when a request failed."""


def add_parser(subparsers: Any) -> None:
    """Add `bench` and its options."""
    parser = subparsers.add_parser(
        "bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="server, without /v1 (default %(default)s)")
    add("--api-key", default="", help="key sent as a Bearer token; never written to the results (default none)")
    add("--model", default="", help="model name in the requests (default the first one the server lists)")
    add("--concurrency", type=_positive, default=1, help="requests open at once (default %(default)s)")
    add("--num-requests", type=_positive, help="measured requests (default 10 x concurrency)")
    add("--num-warmup", type=_natural, help="requests sent before measuring (default 2 x concurrency)")
    add("--input-tokens", type=_positive, default=1024, help="longest prompt, tokens (default %(default)s)")
    add("--output-tokens", type=_positive, default=128, help="longest output, tokens (default %(default)s)")
    add(
        "--random-range-ratio",
        type=_ratio,
        default=1.0,
        help="lengths are uniform between this share of the longest and the longest; 1 = all equal (default 1)",
    )
    add("--vocab-size", type=_positive, help="random ids are below this (default what the server's model list says)")
    add("--seed", type=int, default=0, help="seed of prompts and lengths (default %(default)s)")
    add("--timeout-s", type=float, default=600.0, help="seconds without a byte that fail a request (default 600)")
    add("--device", default="", help="what the server runs on, for the record (default this machine's processor)")
    add("--out", type=Path, metavar="FILE", help="JSONL file to which one line is added (default none)")


def run(args: argparse.Namespace) -> int:
    """Run the load, print the table, add the JSONL line. Returns 1 when a request failed."""
    settings, results = asyncio.run(_measure(args))
    print(render(results))
    if args.out:
        words = ["***" if args.api_key and args.api_key in word else word for word in sys.argv]
        append_record(args.out, make_record(words, args.device, {"url": args.url, **asdict(settings)}, results))
    return 1 if results["num_failed"] else 0


async def _measure(args: argparse.Namespace) -> tuple[load.LoadSettings, dict[str, Any]]:
    headers = {"content-type": "application/json"}
    if args.api_key:
        headers["authorization"] = f"Bearer {args.api_key}"
    async with httpx.AsyncClient(
        base_url=args.url.rstrip("/").removesuffix("/v1"),
        headers=headers,
        timeout=args.timeout_s,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,  # a proxy between client and server would be measured too
    ) as client:
        model, vocab_size = await _served_model(client, args)
        settings = load.LoadSettings(
            model=model,
            concurrency=args.concurrency,
            num_requests=args.num_requests or 10 * args.concurrency,
            num_warmup=2 * args.concurrency if args.num_warmup is None else args.num_warmup,
            input_tokens=args.input_tokens,
            output_tokens=args.output_tokens,
            random_range_ratio=args.random_range_ratio,
            vocab_size=vocab_size,
            seed=args.seed,
        )
        with _progress() as progress:
            task = progress.add_task("requests", total=settings.num_requests, tokens=0)
            num_tokens = 0

            def on_end(record: load.RequestRecord) -> None:
                nonlocal num_tokens
                num_tokens += record.num_output_tokens
                progress.update(task, advance=1, tokens=num_tokens)

            return settings, load.summarize(await load.run_load(client, settings, on_end))


async def _served_model(client: httpx.AsyncClient, args: argparse.Namespace) -> tuple[str, int]:
    """The model's name and vocabulary size: as given, else what /v1/models says."""
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        cards = {card["id"]: card for card in response.json()["data"]}
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise Dsv4Error(f"{args.url}/v1/models: {str(error) or type(error).__name__}") from None
    name = args.model or next(iter(cards), "")
    if name not in cards:
        raise Dsv4Error(f"{args.url} does not serve the model {name!r}; it serves {', '.join(cards) or 'none'}")
    vocab_size = args.vocab_size or cards[name].get("vocab_size")
    if not isinstance(vocab_size, int):
        raise Dsv4Error(f"{args.url}/v1/models does not say the vocabulary size; give --vocab-size")
    return name, vocab_size


def _progress() -> Progress:
    """A bar on stderr; nothing is drawn where that is not a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens out"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def render(results: dict[str, Any]) -> str:
    """The results of `load.summarize` as a table for people."""
    lines = [
        f"requests       {results['num_completed']} completed, {results['num_failed']} failed"
        f" in {results['duration_s']:.2f} s ({results['requests_per_s']:.2f}/s)",
        f"tokens         {results['num_input_tokens']} in, {results['num_output_tokens']} out",
        f"throughput     {results['output_tokens_per_s']:.1f} out + {results['input_tokens_per_s']:.1f} in"
        f" = {results['total_tokens_per_s']:.1f} tokens/s",
    ]
    if results["interactivity"]:
        lines.append(f"interactivity  {results['interactivity']:.1f} tokens/s/user")
    lines.append(f"{'ms':<6}" + "".join(f"{name:>12}" for name in ("mean", "p50", "p95", "p99")))
    for name in ("ttft", "itl", "tpot", "e2e"):
        if spread := results[f"{name}_ms"]:
            lines.append(f"{name:<6}" + "".join(f"{value:12.2f}" for value in spread.values()))
    lines += [f"failed {count} x: {message}" for message, count in results["failures"].items()]
    return "\n".join(lines)


def _positive(text: str) -> int:
    return _bounded(text, 1)


def _natural(text: str) -> int:
    return _bounded(text, 0)


def _bounded(text: str, least: int) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is below {least}")
    return value


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value
