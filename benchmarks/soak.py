"""Many streams with random disconnects against the real processes; what is left behind afterwards.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/soak.py --seconds 300

A closed loop of --streams clients; each request asks for a random number of tokens, and some clients hang up in the
middle. Before and after, idle: used slots and requests, pages (the prefix cache keeps some), file descriptors and
memory of every process. During the load: how late the frontend's event loop was, and beside it how late a process is
that does nothing but sleep: what the machine, often a virtual one, holds up by itself. Exits 1 when a slot, a request
or a descriptor is left, or a request ended wrong.

So that growth of memory means a leak: the cache is small and the warm-up, the same load, uses all of it, because the
system counts memory from the first touch on; and malloc is told to give back what is freed, instead of keeping holes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from dsv4serve.api.live import quantile
from dsv4serve.cli.record import append_record, make_record
from dsv4serve.config import EngineConfig, Numerics, default_model
from dsv4serve.engine.private import private_server
from dsv4serve.obs.metrics import LOOP_LAG

OUT = Path(__file__).parent / "results/soak.jsonl"
SPARE_DESCRIPTORS = 2  # of a process: log files and timers come and go
CACHE_BYTES = 64 << 20
LATE_S = 0.05
SLEEPER = """
import sys, time
while True:
    begin = time.perf_counter()
    time.sleep(0.01)
    late = time.perf_counter() - begin - 0.01
    if late > float(sys.argv[1]):
        print(late, flush=True)
"""
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc


async def one(client: httpx.AsyncClient, draw: random.Random, model: str, disconnect: float) -> str:
    """One streamed request; how it ended."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": " ".join(str(draw.random()) for _ in range(draw.randint(1, 30)))}],
        "max_tokens": draw.randint(1, 120),
        "stream": True,
        "ignore_eos": True,
    }
    hang_up = draw.randint(1, 20) if draw.random() < disconnect else None
    finish = ""
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                return f"HTTP {response.status_code}"
            count = 0
            async for line in response.aiter_lines():
                count += line.startswith("data:")
                if count == hang_up:
                    return "disconnected"
                if '"finish_reason":"' in line:
                    finish = line.split('"finish_reason":"')[1].split('"')[0]
    except httpx.HTTPError as error:
        return type(error).__name__
    return finish or "no finish_reason"


async def load(url: str, key: str, args: argparse.Namespace) -> Counter[str]:
    """Everything the clients saw."""
    ends: Counter[str] = Counter()
    deadline = time.monotonic() + args.seconds
    limits = httpx.Limits(max_connections=args.streams, max_keepalive_connections=args.streams)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits, trust_env=False) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def stream(number: int) -> None:
            draw = random.Random(f"{args.seed}:{number}")
            while time.monotonic() < deadline:
                ends[await one(client, draw, model, args.disconnect)] += 1

        await asyncio.gather(*(stream(number) for number in range(args.streams)))
    return ends


def processes(launcher: psutil.Process) -> dict[str, dict[str, float]]:
    """Descriptors and memory of the server's processes, by what they are."""
    result = {}
    for process in [launcher, *launcher.children(recursive=True)]:
        module = next((part for part in process.cmdline() if part.startswith("dsv4serve.")), process.name())
        label = f"{module}:{len([name for name in result if name.startswith(module)])}"
        result[label] = {"fds": process.num_fds(), "rss_mib": round(process.memory_info().rss / 2**20, 1)}
    return result


def idle_state(url: str, key: str, launcher: psutil.Process) -> dict[str, Any]:
    """The server when nothing is left to do, or after 60 s of waiting for that."""
    deadline = time.monotonic() + 60
    while True:
        stats = httpx.get(f"{url}/stats", headers={"authorization": f"Bearer {key}"}, trust_env=False).json()
        time.sleep(3)  # connections close, a fresh sample is taken
        if not stats["running"] + stats["queued"] or time.monotonic() > deadline:
            return {"stats": stats, "processes": processes(launcher)}


class Sleeper:
    """A process that is late only when the machine is; `late` has its seconds, of those above LATE_S, afterwards."""

    def __enter__(self) -> Sleeper:
        command = [sys.executable, "-c", SLEEPER, str(LATE_S)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self.late = [round(float(line), 3) for line in self._process.communicate()[0].splitlines()]


def lag_counts(url: str) -> dict[float, float]:
    """Probes of the frontends' event loops so far, by how late they were at most (seconds)."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    found = [line for line in lines if line.startswith(f"{LOOP_LAG}_bucket")]
    return {float(line.split('le="')[1].split('"')[0]): float(line.split()[-1]) for line in found}


def lag_between(before: dict[float, float], after: dict[float, float]) -> dict[str, float]:
    """Quantiles in seconds, within the width of a bucket, and how many probes were late by more than 50 ms."""
    counts = {bound: count - before.get(bound, 0.0) for bound, count in after.items()}
    quantiles = {f"p{share}": round(quantile(counts, share / 100), 5) for share in (50, 99, 100)}
    total = counts[float("inf")]
    return {**quantiles, "num_probes": total, "num_above_50_ms": total - counts[LATE_S]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="length of the load (default %(default)s)")
    parser.add_argument("--warm-up", type=float, default=60, help="seconds of load before it (default %(default)s)")
    parser.add_argument("--streams", type=int, default=256, help="clients (default %(default)s)")
    parser.add_argument("--disconnect", type=float, default=0.1, help="share of hang-ups (default %(default)s)")
    parser.add_argument("--numerics", choices=list(Numerics), default="exact", help="(default %(default)s: more ends)")
    parser.add_argument("--seed", type=int, default=1, help="of the clients (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="JSONL file (default %(default)s)")
    args = parser.parse_args()
    config = EngineConfig(
        model=default_model(),
        numerics=args.numerics,
        max_waiting_requests=4 * args.streams,
        cache_bytes=CACHE_BYTES,
    )
    os.environ.update(MALLOC)  # for the processes that are started now
    with private_server(config) as server:
        launcher = psutil.Process().children()[0]
        warm_up = argparse.Namespace(**vars(args) | {"seconds": args.warm_up, "seed": args.seed + 1})
        asyncio.run(load(server.url, server.api_key, warm_up))
        before = idle_state(server.url, server.api_key, launcher)
        lag = lag_counts(server.url)
        with Sleeper() as sleeper:
            ends = asyncio.run(load(server.url, server.api_key, args))
        lag_s = lag_between(lag, lag_counts(server.url))
        after = idle_state(server.url, server.api_key, launcher)
    results = {
        "ends": dict(ends),
        "event_loop_lag_s": lag_s,
        "sleeper_late_s": sleeper.late,
        "load_average": os.getloadavg()[0],
    }
    results |= {"before": before, "after": after}
    settings = {
        "seconds": args.seconds,
        "warm_up": args.warm_up,
        "cache_bytes": CACHE_BYTES,
        "numerics": args.numerics,
        "streams": args.streams,
        "disconnect": args.disconnect,
        "seed": args.seed,
    }
    append_record(args.out, make_record(["benchmarks/soak.py"], "", settings, results))
    grown = [
        name
        for name, found in after["processes"].items()
        if found["fds"] > before["processes"].get(name, found)["fds"] + SPARE_DESCRIPTORS
    ]
    left = after["stats"]["running"] + after["stats"]["queued"]
    wrong = {end: count for end, count in ends.items() if end not in ("length", "stop", "disconnected")}
    for name, found in after["processes"].items():
        print(name, before["processes"].get(name), "->", found)
    print("event loop lag", lag_s, "a sleeper was late", sleeper.late)
    print("ends", dict(ends), "requests left", left, "descriptors grew in", grown, "wrong ends", wrong)
    return 1 if grown or left or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
