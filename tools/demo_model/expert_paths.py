"""What each precision of the routed experts costs in quality: one line with all of them side by side.

    python -m tools.demo_model.expert_paths --model DIR --out benchmarks/results/expert-paths.jsonl

For each choice of `expert_activations`, at `official` numerics:
- nats per token on the held-out mix, by category, in the whole-sequence reference model;
- the gates, through a server of its own, which drafts with the MTP block: its accept rates are those of these answers.
The finding is fp4 (W4A4) against fp8 (W4A8, what the model was trained with): perplexity within 1 % and every gate
within 1 point. A difference of one probe in fewer than 100 is more than a point.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from dsv4serve.cli.conversation import connect
from dsv4serve.cli.record import append_record, make_record
from dsv4serve.config import DraftMode, ExpertActivations, Numerics
from dsv4serve.config.engine import default_model
from dsv4serve.engine.private import private_server
from tools.demo_model.drafts import NUM_DRAFTS
from tools.demo_model.evaluate import Question, answers_of, engine_config, results_of
from tools.demo_model.offline import LENGTH, ROWS, held_out_mix, load_model, mix_nats
from tools.demo_model.probing import SUITES, held_out, judge, tabulate

PERPLEXITY_BOUND, GATE_BOUND = 0.01, 0.01  # relative, and of a share
PATHS = tuple(ExpertActivations)


def accept_rates(exposition: str) -> list[float | None]:
    """Accepted of all drafts at each position, of a server's /metrics; None where none was verified.

    A draft behind a wrong one counts as not accepted, other than in drafts.py.
    """
    counts: dict[str, dict[str, float]] = {"draft": {}, "accepted": {}}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            for name, found in counts.items():
                if sample.name == f"dsv4serve:spec_{name}_tokens_total":
                    found[sample.labels["position"]] = sample.value
    drafted, accepted = counts["draft"], counts["accepted"]
    return [accepted.get(key, 0.0) / drafted[key] if drafted[key] else None for key in sorted(drafted)]


def ask_path(model: Path, path: ExpertActivations, suites: Sequence[str], questions: Sequence[Question]) -> Any:
    """Rows, gates and accept rates of one path."""
    config = engine_config(model, path, num_draft_tokens=NUM_DRAFTS, draft_mode=DraftMode.FIXED)
    with private_server(config) as private, connect(private.url, private.api_key) as client:
        answers = asyncio.run(answers_of(client, questions))
        exposition = httpx.get(f"{private.url}/metrics", trust_env=False).text
    rows = tabulate((*question, answer) for question, answer in zip(questions, answers, strict=True))
    num_failed = sum(answer.finish_reason.startswith("HTTP") for answer in answers)
    return results_of(rows, judge(rows, suites), num_failed) | {"accept_rates": accept_rates(exposition)}


def finding(nats: Mapping[str, float], gates: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """fp4 against fp8, of nats per token and gates by path: relative perplexity, the largest difference of a gate."""
    perplexity = math.exp(nats["fp4"] - nats["fp8"]) - 1
    pairs = zip(gates["fp4"], gates["fp8"], strict=True)
    measured = [(a["share"] - b["share"], a) for a, b in pairs if None not in (a["share"], b["share"])]
    difference, gate = max(measured, key=lambda item: abs(item[0]), default=(None, {}))
    return {
        "perplexity": perplexity,
        "perplexity_within_bound": abs(perplexity) <= PERPLEXITY_BOUND,
        "largest_gate_difference": difference,
        "gate": f"{gate['suite']}, {gate['category']}, {gate['measure']}" if gate else "",
        "gates_within_bound": difference is not None and abs(difference) <= GATE_BOUND,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All results; what is printed is printed as soon as it is known."""
    models = [load_model(args.model, Numerics.OFFICIAL, path) for path in PATHS]
    nats = mix_nats(models, held_out_mix(args.model, args.batches))
    print(f"{'nats per token':<44}" + "".join(f"{path:>10}" for path in PATHS))
    for name, values in nats.items():
        print(f"{name:<44}" + "".join(f"{value:10.4f}" for value in values), flush=True)
    del models

    suites = args.suite or list(SUITES)
    questions = [(suite, probe) for suite in suites for probe in held_out(suite, args.num)]
    asked = {}
    for path in PATHS:
        asked[path.value] = ask_path(args.model, path, suites, questions)
        print(f"\n{path}: drafts accepted {asked[path.value]['accept_rates']}")
        for gate in asked[path.value]["gates"]:
            print(f"{gate['suite']:<16}{gate['category']:<28}{gate['measure']:<12}{gate['share']}", flush=True)
    totals = dict(zip((path.value for path in PATHS), nats["all"], strict=True))
    found = finding(totals, {path: results["gates"] for path, results in asked.items()})
    print(f"\nfp4 against fp8: {found}")
    by_path = {
        path: {"nats": {name: values[index] for name, values in nats.items()}} | results
        for index, (path, results) in enumerate(asked.items())
    }
    return {"paths": by_path, "fp4_against_fp8": found}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_model.expert_paths",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=Path, default=default_model(), metavar="DIR", help="checkpoint (default: the embedded one)")
    add("--num", type=int, default=20, metavar="N", help="probes of each category (default: %(default)s)")
    add("--batches", type=int, default=4, metavar="N", help=f"of {ROWS} x {LENGTH} tokens, for nats (default: 4)")
    add("--suite", action="append", choices=list(SUITES), help="only this section, repeatable (default: all)")
    add("--out", type=Path, metavar="FILE", help="JSONL file to which one line is added (default: none)")
    args = parser.parse_args(words)
    results = measure(args)
    if args.out:
        settings = {"num_per_category": args.num, "batches": args.batches, "suites": args.suite or list(SUITES)}
        command = ["python", "-m", "tools.demo_model.expert_paths", *words]
        append_record(args.out, make_record(command, "", settings, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
