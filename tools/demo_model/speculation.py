"""What the engine's drafts do to the held-out probes, greedily, with and without them.

    python -m tools.demo_model.speculation --numerics exact official --out benchmarks/results/acceptance.jsonl

- whether the answers are the same ids;
- accept rates by category and place, as the engine counts them;
- against them what the reference model says of the same verifies (drafts.py: whole sequences, no cache), and its rates
  over all places of the answers.

Exits 1 when ids differ at `exact` numerics.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.cli.record import append_record, make_record
from dsv4serve.config import DraftMode, EngineConfig, Numerics
from dsv4serve.config.engine import default_model
from dsv4serve.model.transformer import Transformer
from dsv4serve.model.whole import WholeSequence
from dsv4serve.runner import build_runner
from tools.demo_model.drafts import NUM_DRAFTS, Acceptance, draft_tokens, num_right
from tools.demo_model.loop import Loop, Prompt, Served
from tools.demo_model.offline import prompt_ids
from tools.demo_model.probing import SUITES, held_out

CONCURRENCY = 16
CACHE_BYTES = 1 << 29
DEVIATIONS = 1.96  # a 95 % interval


@dataclass
class Category:
    """Counts of one category. A draft is judged when those before it were right and its place lies in the answer."""

    num_probes: int = 0
    num_same: int = 0  # probes with the same ids with and without drafts
    num_verifies: int = 0
    num_agreeing: int = 0  # verifies of which the reference model accepts as many
    judged: list[int] = field(default_factory=lambda: [0] * NUM_DRAFTS)
    accepted: list[int] = field(default_factory=lambda: [0] * NUM_DRAFTS)
    num_tokens: int = 0  # that verifies wrote
    offline: Acceptance = field(default_factory=Acceptance.empty)

    def rates(self) -> list[float | None]:
        """Accept rates of the engine's first, second, .. drafts."""
        return [right / judged if judged else None for right, judged in zip(self.accepted, self.judged, strict=True)]

    def describe(self) -> dict[str, Any]:
        """For the record: rates with 95 % intervals, the engine's and the reference's."""
        offline = self.offline
        tokens = [self.num_tokens / self.num_verifies if self.num_verifies else None, offline.mean_length()]
        mine, others = _rounded(tokens)
        return {
            "probes": self.num_probes,
            "same_ids": self.num_same,
            "verifies": self.num_verifies,
            "verifies_as_reference": self.num_agreeing,
            "rates": _rounded(self.rates()),
            "half_intervals": _half_intervals(self.accepted, self.judged),
            "tokens_per_verify": mine,
            "offline_rates": _rounded(offline.rates()),
            "offline_half_intervals": _half_intervals(offline.right, offline.judged),
            "offline_tokens_per_verify": others,
        }


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 4) for value in values]


def _half_intervals(right: Sequence[int], judged: Sequence[int]) -> list[float | None]:
    """Of shares, 95 %."""
    shares = [
        (a + 1) / (b + 2) for a, b in zip(right, judged, strict=True)
    ]  # of all or none the plain one would be sure
    spreads = [DEVIATIONS * sqrt(p * (1 - p) / n) if n else None for p, n in zip(shares, judged, strict=True)]
    return _rounded(spreads)


def load_loops(model: Path, numerics: Numerics) -> tuple[Transformer, Loop, Loop]:
    """The model, and engines over it: one without drafts, one that always makes NUM_DRAFTS."""
    loops = []
    for num_drafts in (0, NUM_DRAFTS):
        config = EngineConfig(
            model=model,
            numerics=numerics,
            num_draft_tokens=num_drafts,
            draft_mode=DraftMode.FIXED,
            max_running_requests=CONCURRENCY,
            cache_bytes=CACHE_BYTES,
        )
        loops.append(Loop(config, build_runner(config)))
    return loops[0].runner.transformer, *loops


@torch.inference_mode()
def compare(model: Transformer, prompt: list[int], plain: Served, drafted: Served, into: Category) -> None:
    """Count one probe."""
    first, length = len(prompt), len(drafted.ids)
    ids = torch.tensor(prompt + drafted.ids)
    drafts = draft_tokens(model, ids, model(ids, WholeSequence(len(ids))), first)
    into.num_probes += 1
    into.num_same += plain.ids == drafted.ids
    into.offline.add(drafts, ids, first)
    for verify in drafted.verifies:
        room = min(verify.num_drafts, length - verify.index)  # drafts behind the answer's end are nobody's
        num_accepted = min(verify.num_accepted, room)
        expected = min(num_right(drafts[:, verify.index - 1], ids[first + verify.index :]), room)
        into.num_verifies += 1
        into.num_agreeing += expected == num_accepted
        into.num_tokens += min(num_accepted + 1, length - verify.index)
        for place in range(min(room, num_accepted + 1)):
            into.judged[place] += 1
            into.accepted[place] += place < num_accepted


def measure(model_path: Path, numerics: Numerics, suites: Sequence[str], num: int) -> dict[str, Category]:
    """All categories of the suites, `num` probes of each."""
    tokenizer = ChatTokenizer(model_path)
    probes = [probe for suite in suites for probe in held_out(suite, num)]
    prompts: list[Prompt] = [(prompt_ids(tokenizer, probe), probe.max_tokens) for probe in probes]
    model, plain, drafted = load_loops(model_path, numerics)
    answers = [loop.serve(prompts, CONCURRENCY) for loop in (plain, drafted)]
    categories: dict[str, Category] = {}
    for probe, (prompt, _), *both in zip(probes, prompts, *answers, strict=True):
        compare(model, prompt, *both, categories.setdefault(probe.category, Category()))
    return categories


def print_table(found: dict[str, Category]) -> None:
    """For people."""
    print(
        f"{'drafts accepted':<36}{'engine: first, second, third, tokens':>40}{'reference: the same':>40}{'agree':>14}"
    )
    for name, one in found.items():
        record = one.describe()
        values = [*record["rates"], record["tokens_per_verify"]]
        values += [*record["offline_rates"], record["offline_tokens_per_verify"]]
        cells = "".join(f"{'-':>10}" if value is None else f"{value:10.3f}" for value in values)
        print(f"{name:<36}{cells}{one.num_agreeing:>8} of {one.num_verifies}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_model.speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=Path, default=default_model(), metavar="DIR", help="checkpoint (default: the embedded one)")
    add("--numerics", type=Numerics, nargs="+", default=[Numerics.EXACT], help="exact, official (default: exact)")
    add("--num", type=int, default=10, metavar="N", help="probes of each category (default: %(default)s)")
    add("--suite", action="append", choices=list(SUITES), help="only this section, repeatable (default: all)")
    add("--out", type=Path, metavar="FILE", help="JSONL file to which one line for each numerics is added")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    suites, is_wrong = args.suite or list(SUITES), False
    for numerics in args.numerics:
        found = measure(args.model, numerics, suites, args.num)
        num_probes = sum(one.num_probes for one in found.values())
        num_same = sum(one.num_same for one in found.values())
        print(f"\n{numerics.value}: {num_same} of {num_probes} answers have the same ids with {NUM_DRAFTS} drafts")
        print_table(found)
        is_wrong |= numerics is Numerics.EXACT and num_same < num_probes
        if args.out:
            settings = {"numerics": numerics.value, "num_per_category": args.num, "suites": suites, "threads": 1}
            results = {
                "probes": num_probes,
                "same_ids": num_same,
                "categories": {name: one.describe() for name, one in found.items()},
            }
            command = ["python", "-m", "tools.demo_model.speculation", *words]
            append_record(args.out, make_record(command, "", settings | {"num_drafts": NUM_DRAFTS}, results))
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
