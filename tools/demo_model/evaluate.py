"""Asks a demo model the held-out probes of all builders, through the HTTP API, and holds the answers to the gates.

    python -m tools.demo_model.evaluate --model DIR --out benchmarks/results/demo-quality.jsonl

Greedy, at `official` numerics. Exits 1 when a gate fails or could not be measured, or a request failed.
What can only be measured inside the model (nats, drafts, the indexer) is in offline.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress

from dsv4serve.cli.conversation import connect, served_model
from dsv4serve.cli.record import append_record, make_record
from dsv4serve.config import EngineConfig, ExpertActivations, Numerics
from dsv4serve.config.engine import default_model
from dsv4serve.engine.private import private_server
from dsv4serve.types import Dsv4Error
from tools.demo_model.probing import (
    SUITES,
    Row,
    Verdict,
    add_expert_activations,
    held_out,
    judge,
    render_table,
    tabulate,
)
from tools.demo_model.sample import Answer, Probe

NUM_STREAMS = 16
FULL_NUM, FAST_NUM = 200, 6  # probes of each category; the fast ones take under 2 minutes on one CPU thread
TIMEOUT_S = 600.0

Question = tuple[str, Probe]  # suite, probe


def request_body(probe: Probe, model: str) -> dict[str, Any]:
    """The chat completion that asks `probe`."""
    body: dict[str, Any] = {
        "model": model,
        "messages": probe.messages,
        "max_tokens": probe.max_tokens,
        "temperature": 0,
        "chat_template_kwargs": {"thinking": probe.thinking},
    }
    return body | ({"tools": probe.tools} if probe.tools else {})


def read_answer(response: httpx.Response) -> Answer:
    """The answer in a response; an HTTP error is an empty one whose finish_reason says so."""
    if response.status_code != 200:
        return Answer("", "", [], f"HTTP {response.status_code}: {response.text[:200]}")
    choice = response.json()["choices"][0]
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
    return Answer(message["content"] or "", message.get("reasoning_content") or "", calls, choice["finish_reason"])


async def ask(
    client: httpx.AsyncClient, model: str, questions: Sequence[Question], on_end: Callable[[], None]
) -> list[Answer]:
    """The answers in order, NUM_STREAMS requests at a time."""
    answers: list[Answer] = [Answer("", "", [], "not asked")] * len(questions)
    waiting = iter(enumerate(questions))

    async def work() -> None:
        for index, (_, probe) in waiting:  # shared: who is free takes the next
            response = await client.post("/v1/chat/completions", json=request_body(probe, model))
            answers[index] = read_answer(response)
            on_end()

    await asyncio.gather(*(work() for _ in range(NUM_STREAMS)))
    return answers


def engine_config(model: Path, expert_activations: ExpertActivations, **more: Any) -> EngineConfig:
    """The private server's: `official` numerics, as many requests as are asked at a time."""
    return EngineConfig(
        model=model,
        numerics=Numerics.OFFICIAL,
        expert_activations=expert_activations,
        max_running_requests=NUM_STREAMS,
        log_level="warning",
        **more,
    )


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[httpx.Client]:
    """A client of --url, or of a private server for --model."""
    if args.url:
        with connect(args.url, "") as client:
            yield client
        return
    config = engine_config(args.model, args.expert_activations)
    with private_server(config) as private, connect(private.url, private.api_key) as client:
        yield client


async def answers_of(client: httpx.Client, questions: Sequence[Question]) -> list[Answer]:
    """`ask` with a progress bar."""
    console = Console(stderr=True)
    async with httpx.AsyncClient(
        base_url=client.base_url, headers=client.headers, timeout=TIMEOUT_S, trust_env=False
    ) as asynchronous:
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task("probes", total=len(questions))
            model = served_model(client, "")
            return await ask(asynchronous, model, questions, lambda: progress.advance(task))


def results_of(rows: Sequence[Row], verdicts: Sequence[Verdict], num_failed: int) -> dict[str, Any]:
    """Rows and gates for the record."""
    return {
        "num_failed_requests": num_failed,
        "gates": [vars(verdict.gate) | {"share": verdict.share, "passed": verdict.passed} for verdict in verdicts],
        "rows": [
            {
                "suite": row.suite,
                "category": row.category,
                "num": row.num,
                "shares": {measure: round(row.share(measure), 4) for measure in row.judged},
            }
            for row in rows
        ],
    }


def write_wrong(path: Path, answered: Sequence[tuple[str, Probe, Answer]]) -> None:
    """One JSON line for every answer with an untrue measure."""
    with path.open("w", encoding="utf-8") as file:
        for suite, probe, answer in answered:
            measures = probe.check(answer)
            if not all(measures.values()):
                line = {"suite": suite, "category": probe.category, "measures": measures, "messages": probe.messages}
                file.write(json.dumps(line | {"answer": vars(answer)}, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_model.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=Path, default=default_model(), metavar="DIR", help="checkpoint (default: the embedded one)")
    add("--url", default="", help="ask this server instead of a private one for --model (default: none)")
    add_expert_activations(parser)
    add("--num", type=int, metavar="N", help=f"probes of each category (default: {FULL_NUM})")
    add("--fast", action="store_true", help=f"{FAST_NUM} probes of each category, under 2 minutes (default: off)")
    add("--suite", action="append", choices=list(SUITES), help="only this section, repeatable (default: all)")
    add("--out", type=Path, metavar="FILE", help="JSONL file to which one line is added (default: none)")
    add("--wrong", type=Path, metavar="FILE", help="JSONL file for questions and answers that failed (default: none)")
    args = parser.parse_args(words)
    num = args.num or (FAST_NUM if args.fast else FULL_NUM)
    suites = args.suite or list(SUITES)
    questions = [(suite, probe) for suite in suites for probe in held_out(suite, num)]
    try:
        with server(args) as client:
            answers = asyncio.run(answers_of(client, questions))
    except (Dsv4Error, httpx.HTTPError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    answered = [(suite, probe, answer) for (suite, probe), answer in zip(questions, answers, strict=True)]
    rows = tabulate(answered)
    verdicts = judge(rows, suites)
    failed = [answer.finish_reason for answer in answers if answer.finish_reason.startswith("HTTP")]
    print(render_table(rows, verdicts))
    if failed:
        print(f"{len(failed)} requests failed, the first with {failed[0]}")
    if args.wrong:
        write_wrong(args.wrong, answered)
    if args.out:
        settings = {"num_per_category": num, "suites": suites, "numerics": "official"} | (
            {"url": args.url} if args.url else {"expert_activations": args.expert_activations}
        )
        command = ["python", "-m", "tools.demo_model.evaluate", *words]
        append_record(args.out, make_record(command, "", settings, results_of(rows, verdicts, len(failed))))
    return 1 if failed or not all(verdict.passed for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
