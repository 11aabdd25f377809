"""What drafts are worth: tokens/s of one user and of all, without drafts, with fixed numbers of them, and adaptive.

    OMP_NUM_THREADS=1 python -m benchmarks.speculation speed
    OMP_NUM_THREADS=1 python -m benchmarks.speculation forced

Scheduler and runner in this process (tools/demo_model/loop.py), no HTTP. Every round runs every mode, in another order;
medians over the rounds are compared, and adaptive with the best of the others round by round.

speed: greedy answers to the demo model's held-out probes, at each concurrency; the same tokens in every mode.
forced: the acceptance does not come from the model: whatever it says, drafts are accepted at random at a given rate
(accepted / all drafts), each with the same probability once those before it were. Then the text is nonsense, but its
cost is not. Measured are steps, and the rate of tokens that (1 + rate x drafts) a step makes of them.

The clock is by default this process' processor time, which other programs on a busy machine disturb less; with a GPU
take --clock wall.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.cli.record import append_record, make_record
from dsv4serve.config import DraftMode, EngineConfig, Numerics, default_model
from dsv4serve.runner import build_runner
from dsv4serve.speculative import judge
from tools.demo_model.loop import Loop, Prompt
from tools.demo_model.offline import prompt_ids
from tools.demo_model.probing import held_out

SUITES = ("stories", "arithmetic", "tools", "json")  # recall is nothing but prefill
NUM_PER_CATEGORY = 40
REQUESTS = {1: 8, 4: 12, 16: 40}  # concurrency: prompts of one run
FORCED_TOKENS = 48  # of each request
MODES = {"none": 0, "fixed 1": 1, "fixed 2": 2, "fixed 3": 3, "adaptive": 3}
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
CACHE_BYTES = 1 << 28


class ForcedJudge:
    """`judge` whose acceptance has a given rate: accepted drafts / all drafts of verifies with `num_drafts`."""

    def __init__(self, rate: float, num_drafts: int, seed: int = 0) -> None:
        self._chance = chance_of(rate, num_drafts)
        self._draw = random.Random(seed)

    def __call__(self, logits: Tensor, rows: Tensor, drafts: Tensor, *others: Any, **settings: Any) -> Any:
        """As much work as `judge`, another result."""
        judge(logits, rows, drafts, *others, **settings)
        accepted = [self._one(count) for count in (drafts >= 0).sum(1).tolist()]
        behind = rows[range(len(accepted)), accepted]
        return torch.tensor(accepted), logits[behind].argmax(-1)

    def _one(self, num_drafts: int) -> int:
        num = 0
        while num < num_drafts and self._draw.random() < self._chance:
            num += 1
        return num


def chance_of(rate: float, num_drafts: int) -> float:
    """The probability of each draft, those before it accepted, with which `rate` of all drafts are: p + p^2 + .. is
    rate x num_drafts."""
    low, high = 0.0, 1.0
    for _ in range(60):
        chance = (low + high) / 2
        if sum(chance**place for place in range(1, num_drafts + 1)) < rate * num_drafts:
            low = chance
        else:
            high = chance
    return high


def make_prompts(model: Path) -> list[Prompt]:
    """All probes, mixed, always in the same order."""
    tokenizer = ChatTokenizer(model)
    probes = [probe for suite in SUITES for probe in held_out(suite, NUM_PER_CATEGORY)]
    random.Random(0).shuffle(probes)
    return [(prompt_ids(tokenizer, probe), probe.max_tokens) for probe in probes]


def make_loop(args: argparse.Namespace, num_drafts: int, mode: DraftMode) -> Loop:
    """An engine of its own."""
    config = EngineConfig(
        model=args.model,
        numerics=args.numerics,
        num_draft_tokens=num_drafts,
        draft_mode=mode,
        cache_bytes=CACHE_BYTES,
        prefix_cache=False,
    )
    return Loop(config, build_runner(config), CLOCKS[args.clock])


def run(loop: Loop, prompts: Sequence[Prompt], concurrency: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Tokens/s of the median request after its first token, and of all requests together."""
    begin = clock()
    served = loop.serve(prompts, concurrency)
    seconds = clock() - begin
    users = [(len(one.ids) - 1) / (one.times[-1] - one.times[0]) for one in served if len(one.times) > 1]
    return median(users), sum(len(one.ids) for one in served) / seconds


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One result for each concurrency."""
    loops = {
        name: make_loop(args, num, DraftMode.ADAPTIVE if name == "adaptive" else DraftMode.FIXED)
        for name, num in MODES.items()
    }
    prompts, clock = make_prompts(args.model), CLOCKS[args.clock]
    chosen = {concurrency: prompts[: REQUESTS[concurrency]] for concurrency in args.concurrency}
    rates: dict[int, dict[str, list[tuple[float, float]]]] = {c: {name: [] for name in MODES} for c in chosen}
    for number in range(args.rounds + 1):  # the first one warms up: caches, and what the policy measures
        for concurrency, mine in chosen.items():
            for name in sorted(MODES, key=lambda name: random.Random(f"{number} {name}").random()):
                rates[concurrency][name].append(run(loops[name], mine, concurrency, clock))
    results = []
    for concurrency, by_mode in rates.items():
        result: dict[str, Any] = {"concurrency": concurrency, "requests": REQUESTS[concurrency]}
        for place, what in enumerate(("tokens_per_s_per_user", "tokens_per_s")):
            measured = {name: [pair[place] for pair in pairs[1:]] for name, pairs in by_mode.items()}
            best = max((name for name in MODES if name != "adaptive"), key=lambda name: median(measured[name]))
            ratios = [mine / other for mine, other in zip(measured["adaptive"], measured[best], strict=True)]
            result[what] = {name: round(median(values), 1) for name, values in measured.items()}
            result[f"{what}_range"] = {name: [round(min(v), 1), round(max(v), 1)] for name, v in measured.items()}
            result[f"{what}_best_fixed"] = best
            result[f"{what}_adaptive_over_best"] = [round(f(ratios), 3) for f in (median, min, max)]
        results.append(result)
        print(f"{concurrency:>3} requests  " + "  ".join(f"{n} {v}" for n, v in result["tokens_per_s"].items()))
        print(f"{'per user':>12}  " + "  ".join(f"{n} {v}" for n, v in result["tokens_per_s_per_user"].items()))
        print(f"{'adaptive / best':>12} all {result['tokens_per_s_adaptive_over_best']}"
              f" per user {result['tokens_per_s_per_user_adaptive_over_best']}")  # fmt: skip
    return results


def forced(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One result for each concurrency: milliseconds of steps, and tokens/s at each rate."""
    numbers = [0, 1, 2, 3, 4]
    loops = {num: make_loop(args, num, DraftMode.FIXED) for num in numbers}
    prompts = [(ids, FORCED_TOKENS) for ids, _ in make_prompts(args.model)]
    results = []
    for concurrency in args.concurrency:
        costs: dict[int, list[float]] = {num: [] for num in numbers}
        accepted: dict[tuple[int, float], list[int]] = {}  # of each full verify
        for number in range(args.rounds + 1):
            for num in sorted(numbers, key=lambda num: random.Random(f"{number} {num}").random()):
                loop = loops[num]
                for rate in args.rates if num else args.rates[:1]:
                    if num:
                        loop.runner._sampler.judge = ForcedJudge(rate, num, number)
                    loop.steps.clear()
                    served = loop.serve(prompts[:concurrency], concurrency, ignore_eos=True)
                    full = [seconds for size, most, seconds in loop.steps if (size, most) == (concurrency, num)]
                    if number:
                        costs[num].append(1000 * median(full))
                        mine = accepted.setdefault((num, rate), [])
                        verifies = [each for one in served for each in one.verifies if each.num_drafts == num]
                        mine += [each.num_accepted for each in verifies]
        ms = {num: median(values) for num, values in costs.items()}
        table = {}
        for num in numbers[1:]:
            gains = [(1 + rate * num) * ms[0] / ms[num] for rate in args.rates]
            table[f"{num} drafts"] = {
                "step_ms": round(ms[num], 3),
                "step_ms_range": [round(min(costs[num]), 3), round(max(costs[num]), 3)],
                "tokens_per_verify": {str(rate): round(1 + mean(accepted[num, rate]), 3) for rate in args.rates},
                "tokens_per_s_per_user": {str(r): round(1000 * (1 + r * num) / ms[num], 1) for r in args.rates},
                "over_none": {str(rate): round(gain, 3) for rate, gain in zip(args.rates, gains, strict=True)},
                "last_rate_over_first": round(gains[-1] / gains[0], 3),
            }
        results.append({"concurrency": concurrency, "none_step_ms": round(ms[0], 3), **table})
        print(results[-1])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["speed", "forced"])
    add("--model", type=Path, default=default_model(), help="checkpoint (default the embedded one)")
    add("--numerics", type=Numerics, default=Numerics.EXACT, help="exact or official (default exact)")
    add("--rounds", type=int, default=5, help="rounds, of which the median counts (default %(default)s)")
    add("--concurrency", type=int, nargs="+", choices=list(REQUESTS), default=list(REQUESTS), help="default all")
    add("--rates", type=float, nargs="+", default=[0.57, 0.70], help="forced accept rates (default %(default)s)")
    add("--clock", choices=list(CLOCKS), default="cpu", help="processor time or wall clock (default %(default)s)")
    add("--out", type=Path, default=Path(__file__).parent / "results/speculation.jsonl", help="JSONL file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = speed(args) if args.what == "speed" else forced(args)
    settings = {"what": args.what, "numerics": args.numerics.value, "clock": args.clock, "rounds": args.rounds}
    for result in results:
        command = ["python", "-m", "benchmarks.speculation", *sys.argv[1:]]
        append_record(args.out, make_record(command, "", settings, result))


if __name__ == "__main__":
    main()
