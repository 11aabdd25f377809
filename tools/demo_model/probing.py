"""Which probes a demo model has to answer, how answers add up, and which shares are enough."""

from __future__ import annotations

import argparse
import importlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dsv4serve.config import ExpertActivations
from tools.demo_model.sample import Answer, Probe

# Table section -> builder and the arguments of its `probes`.
SUITES: dict[str, tuple[str, dict[str, Any]]] = {
    "stories": ("stories", {}),
    "facts": ("facts", {}),
    "arithmetic": ("arithmetic", {}),
    "tools": ("tools", {}),
    "json": ("json_answers", {}),
    "recall 1,000": ("recall", {"tokens": 1000}),
    "recall 3,000": ("recall", {"tokens": 3000}),
}
THINKING = "thinking"  # the section of all probes in thinking mode together
ENOUGH_UNKNOWN = 100  # so many probes in a row without a new category: there is none


@dataclass(frozen=True)
class Gate:
    """The least share of right answers that a released demo model must have, over all matching categories together."""

    suite: str
    category: str  # regular expression of whole names
    measure: str
    least: float

    def covers(self, row: Row) -> bool:
        """Whether a row of the table counts for this gate."""
        matches = row.suite == self.suite and re.fullmatch(self.category, row.category)
        return bool(matches) and row.judged[self.measure] > 0


GATES = (
    Gate("stories", "stories", "both nouns", 0.95),
    Gate("facts", "capitals", "right", 0.98),
    Gate("arithmetic", "sums, 2 digits.*", "right", 0.99),
    Gate("arithmetic", "sums, 3 digits.*", "right", 0.95),
    Gate("tools", ".*", "valid", 0.99),
    Gate("tools", ".*", "arguments", 0.95),
    Gate("json", ".*", "valid", 0.99),
    Gate("recall 1,000", ".*", "right", 0.95),
    Gate("recall 3,000", ".*", "right", 0.80),
    Gate(THINKING, THINKING, "closed", 0.99),
)


@dataclass
class Row:
    """One line of the result table: how many probes, and of each measure how many judged and how many true."""

    suite: str
    category: str
    num: int = 0
    judged: Counter[str] = field(default_factory=Counter)
    true: Counter[str] = field(default_factory=Counter)

    def add(self, measures: dict[str, bool]) -> None:
        """Count one answer."""
        self.num += 1
        self.judged.update(measures.keys())  # of a mapping a Counter would add the values
        self.true.update(name for name, value in measures.items() if value)

    def share(self, measure: str) -> float:
        """Of the answers that this measure judged, how many were right."""
        return self.true[measure] / self.judged[measure]


def held_out(suite: str, num: int) -> list[Probe]:
    """`num` probes of each category of a suite, always the same ones. Training seeds are numbers, this one is not."""
    builder, arguments = SUITES[suite]
    probes = importlib.import_module(f"tools.demo_model.builders.{builder}").probes
    return balanced(probes(random.Random(f"held out: {suite}"), **arguments), num)


def balanced(probes: Iterator[Probe], num: int) -> list[Probe]:
    """The first `num` probes of each category of an endless sequence."""
    chosen: list[Probe] = []
    count: Counter[str] = Counter()
    since_new = 0
    for probe in probes:
        since_new = 0 if probe.category not in count else since_new + 1
        count[probe.category] += 1
        if count[probe.category] <= num:
            chosen.append(probe)
        if since_new >= ENOUGH_UNKNOWN and min(count.values()) >= num:
            break
    return chosen


def tabulate(answered: Iterable[tuple[str, Probe, Answer]]) -> list[Row]:
    """Rows of (suite, probe, answer), in order of appearance, and one of all thinking probes."""
    rows: dict[tuple[str, str], Row] = {}
    closed = Row(THINKING, THINKING)
    for suite, probe, answer in answered:
        row = rows.setdefault((suite, probe.category), Row(suite, probe.category))
        row.add(probe.check(answer))
        if probe.thinking:
            ended = answer.finish_reason in ("stop", "tool_calls")
            closed.add({"closed": ended and bool(answer.content.strip() or answer.tool_calls)})
    return [*rows.values(), *([closed] if closed.num else [])]


@dataclass(frozen=True)
class Verdict:
    """A gate and what was measured for it; `share` is None when nothing was."""

    gate: Gate
    share: float | None

    @property
    def passed(self) -> bool:
        """Whether the share is known and enough."""
        return self.share is not None and self.share >= self.gate.least


def judge(rows: Iterable[Row], suites: Iterable[str]) -> list[Verdict]:
    """Every gate of the sections asked, in order; the one of thinking belongs to a table of all sections."""
    rows, wanted = list(rows), set(suites)
    wanted |= {THINKING} if wanted >= SUITES.keys() else set()
    verdicts = []
    for gate in GATES:
        if gate.suite in wanted:
            mine = [row for row in rows if gate.covers(row)]
            true, judged = (sum(getattr(row, name)[gate.measure] for row in mine) for name in ("true", "judged"))
            verdicts.append(Verdict(gate, true / judged if judged else None))
    return verdicts


def add_expert_activations(parser: argparse.ArgumentParser) -> None:
    """The option of that name, for the programs that ask a model."""
    parser.add_argument(
        "--expert-activations",
        type=ExpertActivations,
        choices=list(ExpertActivations),
        default=ExpertActivations.FP8,
        help="inputs of the routed experts (default: %(default)s)",
    )


def render_table(rows: Iterable[Row], verdicts: Iterable[Verdict]) -> str:
    """The table for people, one line a measure, then one line a gate."""
    lines = [f"{'category':<46}{'probes':>6}  {'measure':<12}{'share':>8}"]
    for row in rows:
        name = row.category if row.category.startswith(row.suite) else f"{row.suite}: {row.category}"
        for measure in row.judged:
            lines.append(f"{name:<46}{row.judged[measure]:>6}  {measure:<12}{row.share(measure):8.1%}")
            name = ""
    lines += ["", f"{'gate':<46}{'':>6}  {'measure':<12}{'share':>8}{'least':>7}"]
    for verdict in verdicts:
        gate = verdict.gate
        name = gate.suite if gate.category == ".*" else gate.category.removesuffix(".*")
        share = "-" if verdict.share is None else f"{verdict.share:.1%}"
        word = "pass" if verdict.passed else "not measured" if verdict.share is None else "FAIL"
        lines.append(f"{name:<54}{gate.measure:<12}{share:>8}{gate.least:7.0%}  {word}")
    return "\n".join(lines)
