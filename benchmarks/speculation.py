"""What drafts are worth: tokens/s of one user and of all, without drafts, with fixed numbers of them, and adaptive.

    OMP_NUM_THREADS=1 python -m benchmarks.speculation speed
    OMP_NUM_THREADS=1 python -m benchmarks.speculation forced
    python3 -m benchmarks.speculation speed --device cuda --out $OUT/speculation.jsonl
    python3 -m benchmarks.speculation forced --device cuda --model pro-deep --out $OUT/speculation.jsonl

Scheduler and runner in this process (tools/demo_model/loop.py), no HTTP. Every round runs every mode, in another order;
medians over the rounds are compared, and adaptive with the best of the others round by round. A line is written when
its concurrency is done.

speed: greedy answers to the demo model's held-out probes, at each concurrency; the same tokens in every mode.
forced: the acceptance does not come from the model: whatever it says, drafts are accepted at random at a given rate
(accepted / all drafts), each with the same probability once those before it were. Then the text is nonsense, but its
cost is not. Measured are steps in which all requests decode, from the end of the step before, and the rate of tokens
that (1 + rate x drafts) a step makes of them. Adaptive is told the rate of each draft, those before it accepted, and
compared with the best fixed number at that, round by round. Its first round is longer, because that is when it tries
all numbers at first.

On a GPU one runner with room for MOST_DRAFTS drafts serves all modes, because a slice takes a minute to build and most
of the memory; so no drafts there still costs the block's keys. Of the demo no drafts has a runner of its own, and
adaptive's no drafts still cost the keys; so forced measures no drafts in adaptive's runner as well, and compares with
the best number of that one, too: what is lost to that is the policy's, the rest is the keys'. How to set up the GPU
machine is in gpu_smoke.py beside this file; one of these commands takes 2 to 4 minutes.

The clock on CPU is by default this process' processor time, which other programs on a busy machine disturb less.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.forced import ForcedDeviceJudge, ForcedJudge, chance_of
from benchmarks.gpu_models import MODELS, engine_config
from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.cli.record import append_record, make_record
from dsv4serve.config import Device, DraftMode, EngineConfig, Numerics
from dsv4serve.runner import Runner, build_runner
from tools.demo_model.loop import Loop, Prompt
from tools.demo_model.offline import prompt_ids
from tools.demo_model.probing import held_out

SUITES = ("stories", "arithmetic", "tools", "json")  # recall is nothing but prefill
NUM_PER_CATEGORY = 40
REQUESTS = {1: 16, 4: 32, 16: 80, 64: 320}  # concurrency: prompts of one run
CPU_CONCURRENCY = [1, 4, 16]
FORCED_STEPS, FORCED_SLICE_STEPS = 64, 32  # of all requests, in one run
FIRST_ROUND_STEPS = 128  # the same of adaptive's first round
FORCED_TOKENS = 512  # of each request at most: enough for the last one to come while the first is still there
SLICE_PROMPT = 1024  # random tokens, which are all that random weights need
MODES = {"none": 0, "fixed 1": 1, "fixed 2": 2, "fixed 3": 3, "adaptive": 3}
MOST_DRAFTS = 3
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
DEMO_CACHE_BYTES, SLICE_CACHE_BYTES = 1 << 28, 1 << 32


class Engines:
    """The engine of each number of drafts.

    Args:
        config: of all of them, but for drafts.
        shares: one runner with room for the most drafts serves every number, but for no drafts if `has_plain`.
    """

    def __init__(self, config: EngineConfig, clock: Callable[[], float], shares: bool, has_plain: bool) -> None:
        self._config, self._clock, self._shares, self._has_plain = config, clock, shares, has_plain
        self._runners: dict[int, Runner] = {}

    def loop(self, num_drafts: int, is_adaptive: bool = False, room: int = 0) -> Loop:
        """A scheduler of its own, with nothing running, over a runner with room for `num_drafts`, or for `room`."""
        room = max(num_drafts, room)
        if self._shares and (room or not self._has_plain):
            room = MOST_DRAFTS
        if room not in self._runners:
            self._runners[room] = build_runner(self._config.model_copy(update={"num_draft_tokens": room}))
        mode = DraftMode.ADAPTIVE if is_adaptive else DraftMode.FIXED
        config = self._config.model_copy(update={"num_draft_tokens": num_drafts, "draft_mode": mode})
        return Loop(config, self._runners[room], self._clock)


def probe_prompts(model: Path) -> list[Prompt]:
    """All probes, mixed, always in the same order."""
    tokenizer = ChatTokenizer(model)
    probes = [probe for suite in SUITES for probe in held_out(suite, NUM_PER_CATEGORY)]
    random.Random(0).shuffle(probes)
    return [(prompt_ids(tokenizer, probe), probe.max_tokens) for probe in probes]


def random_prompts(vocab_size: int, number: int) -> list[Prompt]:
    """For a slice, whose answers mean nothing."""
    draw = random.Random(0)
    return [(draw.choices(range(2, vocab_size), k=SLICE_PROMPT), FORCED_TOKENS) for _ in range(number)]


def run(loop: Loop, prompts: Sequence[Prompt], concurrency: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Tokens/s of the median request after its first token, and of all requests together."""
    begin = clock()
    served = loop.serve(prompts, concurrency)
    seconds = clock() - begin
    users = [(len(one.ids) - 1) / (one.times[-1] - one.times[0]) for one in served if len(one.times) > 1]
    return median(users), sum(len(one.ids) for one in served) / seconds


def speed(engines: Engines, prompts: list[Prompt], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result for each concurrency."""
    loops = {name: engines.loop(num, name == "adaptive") for name, num in MODES.items()}
    for concurrency in args.concurrency:
        mine = prompts[: REQUESTS[concurrency]]
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in MODES}
        for number in range(args.rounds + 1):  # the first one warms up: caches, and what the policy measures
            for name in sorted(MODES, key=lambda name: random.Random(f"{number} {name}").random()):
                if number == 1:
                    loops[name].steps.clear()
                rates[name].append(run(loops[name], mine, concurrency, CLOCKS[args.clock]))
        result: dict[str, Any] = {"concurrency": concurrency, "requests": len(mine)}
        result["full_steps"] = {name: by_drafts(loop, concurrency) for name, loop in loops.items()}
        for place, what in enumerate(("tokens_per_s_per_user", "tokens_per_s")):
            measured = {name: [pair[place] for pair in pairs[1:]] for name, pairs in rates.items()}
            best = max((name for name in MODES if name != "adaptive"), key=lambda name: median(measured[name]))
            ratios = [mine / other for mine, other in zip(measured["adaptive"], measured[best], strict=True)]
            result[what] = {name: round(median(values), 1) for name, values in measured.items()}
            result[f"{what}_range"] = {name: [round(min(v), 1), round(max(v), 1)] for name, v in measured.items()}
            result[f"{what}_best_fixed"] = best
            result[f"{what}_adaptive_over_best"] = [round(f(ratios), 3) for f in (median, min, max)]
        yield result


def by_drafts(loop: Loop, concurrency: int) -> dict[str, list[float]]:
    """Number and median milliseconds of the loop's steps in which so many requests decoded, by their drafts."""
    found: dict[int, list[float]] = {}
    for size, most, seconds in loop.steps:
        if size == concurrency:
            found.setdefault(most, []).append(1000 * seconds)
    return {str(num): [len(times), round(median(times), 3)] for num, times in sorted(found.items())}


class Forced(NamedTuple):
    """A mode of forced acceptance."""

    num_drafts: int
    rate: float
    is_adaptive: bool = False
    room: int = 0  # in the runner, if that is more

    @property
    def chance(self) -> float:
        """Of each draft once those before it were accepted."""
        return self.rate if self.is_adaptive else chance_of(self.rate, self.num_drafts)


def forced(
    engines: Engines,
    prompts: list[Prompt],
    args: argparse.Namespace,
    most: int,
    set_chance: Callable[[Loop, float, int], None],
) -> Iterator[dict[str, Any]]:
    """One result for each concurrency: milliseconds of steps, and tokens/s at each rate.

    `most`: drafts. `set_chance` gives a loop's judge the probability of a draft and the number of the round.
    """
    none, none_with_room = Forced(0, 0.0), Forced(0, 0.0, room=most)
    modes = [none, none_with_room, *(Forced(num, rate) for num in range(1, most + 1) for rate in args.rates)]
    modes += [Forced(most, rate, is_adaptive=True) for rate in args.rates]
    loops = {mode: engines.loop(mode.num_drafts, mode.is_adaptive, mode.room) for mode in modes}
    for concurrency in args.concurrency:
        costs: dict[Forced, list[float]] = {mode: [] for mode in modes}  # milliseconds of each round's steps
        accepted: dict[Forced, list[int]] = {mode: [] for mode in modes}  # of each full verify
        adaptive: dict[Forced, list[list[tuple[int, float]]]] = {mode: [] for mode in modes if mode.is_adaptive}
        for number in range(args.rounds + 1):
            for mode in sorted(modes, key=lambda mode: random.Random(f"{number} {mode}").random()):
                loop = loops[mode]
                if mode.num_drafts:
                    set_chance(loop, mode.chance, number)
                num_steps = args.steps if number or not mode.is_adaptive else max(args.steps, FIRST_ROUND_STEPS)
                steps, verifies = full_steps(loop, prompts[:concurrency], mode, num_steps)
                if number and mode.is_adaptive:
                    adaptive[mode].append(steps)
                elif number:
                    costs[mode].append(1000 * median(seconds for _, seconds in steps))
                    accepted[mode] += verifies
        by_round = {
            num: [mean(each) for each in zip(*(costs[Forced(num, rate)] for rate in args.rates), strict=True)]
            for num in range(1, most + 1)
        }
        with_room = {0: costs[none_with_room], **by_round}
        by_round[0] = costs[none]
        ms = {num: median(values) for num, values in by_round.items()}
        result: dict[str, Any] = {
            "concurrency": concurrency,
            "steps": args.steps,
            "none_step_ms": round(ms[0], 3),
            "none_with_room_step_ms": round(median(with_room[0]), 3),
        }
        for num in range(1, most + 1):
            gains = [(1 + rate * num) * ms[0] / ms[num] for rate in args.rates]
            each = [value for rate in args.rates for value in costs[Forced(num, rate)]]
            result[f"{num} drafts"] = {
                "step_ms": round(ms[num], 3),
                "step_ms_range": [round(min(each), 3), round(max(each), 3)],
                "tokens_per_verify": {str(r): round(1 + mean(accepted[Forced(num, r)]), 3) for r in args.rates},
                "tokens_per_s_per_user": {str(r): round(1000 * (1 + r * num) / ms[num], 1) for r in args.rates},
                "over_none": {str(rate): round(gain, 3) for rate, gain in zip(args.rates, gains, strict=True)},
                "last_rate_over_first": round(gains[-1] / gains[0], 3),
            }
        result["adaptive"] = {
            str(mode.rate): of_adaptive(mode, rounds)
            | {
                "over_best_fixed": over_best(mode, rounds, by_round),
                "over_best_with_room": over_best(mode, rounds, with_room),
            }
            for mode, rounds in adaptive.items()
        }
        yield result


def full_steps(
    loop: Loop, prompts: list[Prompt], mode: Forced, num_steps: int
) -> tuple[list[tuple[int, float]], list[int]]:
    """Drafts and seconds of `num_steps` steps in which all prompts decode with as many drafts as the mode has, or as
    it chooses, or of fewer if answers end before; and what was accepted of each verify."""

    def found() -> list[tuple[int, float]]:
        sizes = [(most, seconds) for size, most, seconds in loop.steps if size == len(prompts)]
        return [each for each in sizes if mode.is_adaptive or each[0] == mode.num_drafts]

    loop.steps.clear()
    served = loop.serve(prompts, len(prompts), ignore_eos=True, is_enough=lambda: len(found()) >= num_steps)
    verifies = [each for one in served for each in one.verifies if each.num_drafts == mode.num_drafts]
    return found(), [each.num_accepted for each in verifies]


def tokens_per_s(mode: Forced, steps: list[tuple[int, float]]) -> float:
    """Of a user, by the median step of each number of drafts."""
    chosen = Counter(num for num, _ in steps)
    total_s = sum(count * median(s for other, s in steps if other == num) for num, count in chosen.items())
    return sum(count * tokens_of(mode, num) for num, count in chosen.items()) / total_s


def tokens_of(mode: Forced, num_drafts: int) -> float:
    """Of a step of adaptive with so many drafts, on average."""
    return sum(mode.chance**place for place in range(num_drafts + 1))


def of_adaptive(mode: Forced, rounds: list[list[tuple[int, float]]]) -> dict[str, Any]:
    """Tokens/s of a user with the numbers of drafts that were chosen; how often each was, and its steps' times."""
    steps = [step for steps in rounds for step in steps]
    numbers = sorted({num for num, _ in steps})
    return {
        "tokens_per_s_per_user": round(median(tokens_per_s(mode, steps) for steps in rounds), 1),
        "steps_by_drafts": {str(num): sum(other == num for other, _ in steps) for num in numbers},
        "step_ms_by_drafts": {
            str(num): round(1000 * median(s for other, s in steps if other == num), 3) for num in numbers
        },
    }


def over_best(mode: Forced, rounds: list[list[tuple[int, float]]], by_round: dict[int, list[float]]) -> dict[str, Any]:
    """Adaptive's tokens/s over those of the number of drafts with the most of them, round by round.

    `by_round`: milliseconds of a step in each round, by number of drafts.
    """
    fixed = {num: [1000 * tokens_of(mode, num) / ms for ms in values] for num, values in by_round.items()}
    best = max(fixed, key=lambda num: median(fixed[num]))
    ratios = [tokens_per_s(mode, steps) / other for steps, other in zip(rounds, fixed[best], strict=True)]
    return {"drafts": best, "median_min_max": [round(f(ratios), 3) for f in (median, min, max)]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["speed", "forced"])
    add("--model", choices=MODELS, default="demo", help="the demo, or with forced a slice on a GPU (default demo)")
    add("--device", type=Device, default=Device.CPU, help="cpu or cuda (default %(default)s)")
    add("--numerics", type=Numerics, help="exact or official (default exact, on a GPU official)")
    add("--rounds", type=int, help="rounds, of which the median counts (default 5, of a slice 2)")
    add("--concurrency", type=int, nargs="+", choices=list(REQUESTS), help="default all, on CPU up to 16")
    add("--rates", type=float, nargs="+", default=[0.57, 0.70], help="forced accept rates (default %(default)s)")
    add("--clock", choices=list(CLOCKS), help="processor time or wall clock (default cpu, on a GPU wall)")
    add("--out", type=Path, default=Path(__file__).parent / "results/speculation.jsonl", help="JSONL file")
    args = parser.parse_args(argv)
    on_gpu, is_slice = args.device is Device.CUDA, args.model != "demo"
    if is_slice and (args.what == "speed" or not on_gpu):
        parser.error("a slice has random weights: take forced and --device cuda, or the demo")
    args.numerics = args.numerics or (Numerics.OFFICIAL if on_gpu else Numerics.EXACT)
    args.rounds = args.rounds or (2 if is_slice else 5)
    args.steps = FORCED_SLICE_STEPS if is_slice else FORCED_STEPS
    args.concurrency = args.concurrency or (list(REQUESTS) if on_gpu else CPU_CONCURRENCY)
    args.clock = args.clock or ("wall" if on_gpu else "cpu")
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"max_running_requests": max(args.concurrency), "numerics": args.numerics}
    if is_slice:
        settings |= {"max_model_len": SLICE_PROMPT + FORCED_TOKENS, "max_step_tokens": 2 * SLICE_PROMPT}
    settings["cache_bytes"] = SLICE_CACHE_BYTES if is_slice else DEMO_CACHE_BYTES
    config = engine_config(args.model, device=args.device, prefix_cache=False, **settings)
    begin = time.perf_counter()
    engines = Engines(config, CLOCKS[args.clock], shares=on_gpu, has_plain=not is_slice)
    with ExitStack() as patches:
        if args.what == "speed":
            results = speed(engines, probe_prompts(config.model), args)
        else:
            set_chance = force(args.device, patches)
            vocab_size = engines.loop(MOST_DRAFTS).runner.vocab_size
            prompts = random_prompts(vocab_size, max(args.concurrency)) if is_slice else probe_prompts(config.model)
            prompts = [(ids, FORCED_TOKENS) for ids, _ in prompts]
            results = forced(engines, prompts, args, MOST_DRAFTS if on_gpu else 4, set_chance)
        described = {"what": args.what, "model": args.model, "device": args.device.value,
                     "numerics": args.numerics.value, "clock": args.clock, "rounds": args.rounds}  # fmt: skip
        command = ["python", "-m", "benchmarks.speculation", *(sys.argv[1:] if argv is None else argv)]
        for result in results:
            append_record(args.out, make_record(command, "", described, result))
            print(f"{time.perf_counter() - begin:.0f} s", result, flush=True)


def force(device: Device, patches: ExitStack) -> Callable[[Loop, float, int], None]:
    """Put the judge in place before an engine is built; see `forced` for what it returns."""
    if device is Device.CPU:

        def set_chance(loop: Loop, chance: float, seed: int) -> None:
            loop.runner._sampler.judge = ForcedJudge(chance, seed)

        return set_chance
    from dsv4serve.runner import device_batch

    judge = ForcedDeviceJudge(torch.device("cuda", torch.cuda.current_device()))
    patches.enter_context(mock.patch.object(device_batch, "judge", judge))
    return lambda loop, chance, seed: judge.set_chance(chance)


if __name__ == "__main__":
    main()
