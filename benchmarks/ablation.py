"""What each fusion of the device engine is worth: decode steps and a prefill with one of them off at a time, and all.

    python3 benchmarks/ablation.py $OUT/ablation.jsonl --seconds 190

How to run it on the GPU machine is in gpu_smoke.py beside this file. Off are, by patches (unfused.py), the fused mHC
boundary, the fused compressor, what shares launches, FP8 activations of experts, early launches; and graphs of decodes
and prefills.
One JSON line for each variant, one more for what follows from them. The time of a step is that of steps submitted one
ahead, as the engine does, all requests at `--context`. Launches are counted on the host: Triton's, and torch's
operations that are no views. All off but graphs of decodes is about the shape of the engines of April 2026, or a worse
one: their mHC was four to six kernels, where here each torch operation is one.

Each variant must compute the same. `decode_error` and `prefill_error` are the median relative error of rows of logits
against the engine as it is, or, for a variant with BF16 experts, which round differently, against it with these alone.
Allowed is the bound of the tests; or `decode_noise` and `prefill_noise`, if they are larger: the error that last bits
of the embedding make, because a network of random weights carries any rounding far. Where it is more the line says
`agrees: false`, and the exit code is 1. The errors of BF16 experts alone, against the engine as it is, have no bound.

Throughput at equal interactivity. Decodes and chunks share the GPU. With B requests of I input and O output tokens in
a closed loop, B prefills of I tokens happen while each request makes O tokens. So a token takes

    TPOT(B) = d(B) + B p / O        d(B): a decode step of B requests, p: the prefill of I tokens

interactivity is 1 / TPOT, throughput is B (I + O) / (O TPOT). From a slice to the model of N layers: a step takes t
with the slice's L layers, r without any (measured, too), and r + (t - r) N / L with N. That is one GPU which holds all
layers; of `pro-rank` one of eight which divide the experts, without their exchange. d is linear between and beyond the
measured batch sizes. For the interactivity that all-off, or all but decode graphs, has with some B, the engine as it is
has the largest B that reaches it. All have at most the requests of I + O tokens that fit into CACHE_BYTES, as
interactivity.py counts them.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ablation_engine import AblationEngine, bf16_experts, build_network, middle
from gpu_models import whole_config
from interactivity import Side, at_equal_interactivity, day0_requests, day0_token_bytes, requests_that_fit, table
from support.device_engine import STEP_BOUND, median_row
from unfused import SWITCHES, Experts, unfused

from dsv4serve.cli.record import append_record, make_record, this_device
from dsv4serve.config import ModelConfig, Numerics
from dsv4serve.memory import CacheLayout
from dsv4serve.model.device import DeviceTransformer
from dsv4serve.types import PAGE_TOKENS

CACHE_BYTES = 60 * 10**9
BF16 = "bf16-experts"
GRAPHS = ("decode-graphs", "prefill-graphs")
MODEL_SECONDS = 60  # a model is not begun when less is left
VARIANT_SECONDS = 6  # nor a variant
COMPARE_SECONDS = 25  # for which single variants leave time
FEW_REQUESTS = (4, 16, 64)  # of all-off, whose interactivity is compared at


def main(argv: Sequence[str] | None = None) -> int:
    deadline = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="JSONL file")
    add("--models", nargs="+", default=["pro-rank", "pro-slice"], help="of gpu_models.py (default %(default)s)")
    add("--batches", type=int, nargs="+", default=[64, 16, 256], help="decodes of a step; all variants run the first")
    add("--context", type=int, default=8192, help="tokens before decodes, a multiple of 256 (default %(default)s)")
    add("--prefill", type=int, default=8192, help="tokens of a prompt (default %(default)s)")
    add("--output", type=int, default=1024, help="output tokens of a request (default %(default)s)")
    add("--steps", type=int, default=20, help="decodes that are timed together (default %(default)s)")
    add("--repeats", type=int, default=3, help="of each timing (default %(default)s)")
    add("--switches", nargs="+", choices=(*SWITCHES, *GRAPHS), default=(*SWITCHES, *GRAPHS), help="(default all)")
    add("--seconds", type=float, default=190, help="what would not end in time is left out (default %(default)s)")
    args = parser.parse_args(argv)
    deadline += args.seconds
    agrees = True
    for name in args.models:
        if deadline - time.perf_counter() < MODEL_SECONDS:
            print(f"{name}: left out, not enough time")
            continue
        full = ModelConfig.from_dict(whole_config(name), name)
        network = build_network(name)
        experts = bf16_experts(name, network) if BF16 in args.switches else []
        ablation = Ablation(name, network, full, args, deadline, experts)
        ablation.run()
        agrees &= ablation.agrees
        del ablation, network, experts
        gc.collect()
        torch.cuda.empty_cache()
    return 0 if agrees else 1


class Ablation:
    """All variants of one network.

    Args:
        full: the model of which `network` has some layers.
        args: of `main`.
        deadline: of time.perf_counter, beyond which nothing is begun.
        experts: as `unfused` takes them.
    """

    def __init__(
        self,
        name: str,
        network: DeviceTransformer,
        full: ModelConfig,
        args: argparse.Namespace,
        deadline: float,
        experts: Sequence[Experts] = (),
    ) -> None:
        self.name, self.network, self.full, self.args, self._deadline = name, network, full, args, deadline
        self.engine = AblationEngine(network, max(args.batches), args.context, args.prefill, args.output)
        self.agrees, self._device = True, this_device()
        impossible = set() if self.engine.is_cuda else set(GRAPHS)
        self._experts = experts
        if network.blocks[0].moe.w13.form != "bf16" and not experts:
            impossible.add(BF16)
        self.everything = tuple(switch for switch in args.switches if switch not in impossible)
        self.day0 = tuple(switch for switch in self.everything if switch != "decode-graphs")
        self.results: dict[tuple[str, ...], dict[str, Any]] = {}  # by what is off
        self._logits: dict[bool, tuple[Tensor, Tensor]] = {}  # of decodes and prefill, without and with BF16 experts
        self._bounds: list[float] = []  # of the errors of both

    def run(self) -> None:
        """Measure, write and print."""
        singles = [(switch,) for switch in self.everything]
        singles.sort(key=lambda off: off != (BF16,))  # the sides are compared with it
        for off in dict.fromkeys([(), *singles[:1], self.everything, self.day0, *singles[1:]]):
            is_single = off not in ((), self.everything, self.day0)
            if off and self._left() < VARIANT_SECONDS + COMPARE_SECONDS * is_single:
                print(f"{self.name}: {self._label(off)} left out, not enough time")
                continue
            self.results[off] = results = self._variant(off)
            self._record({"off": list(off), "batch": self.args.batches[0]}, results)
            print(f"{self.name} {self._label(off)}:", results, flush=True)
        if self.everything in self.results and self._left() > VARIANT_SECONDS:
            self._compare()

    def _label(self, off: tuple[str, ...]) -> str:
        names = {self.day0: "all off but decode graphs", self.everything: "all off", (): "as it is"}
        return names.get(off) or f"{off[0]} off"

    def _left(self) -> float:
        return self._deadline - time.perf_counter()

    def _record(self, settings: dict[str, Any], results: dict[str, Any]) -> None:
        config = self.network.config
        sizes = {"layers": config.num_hidden_layers, "experts": config.n_routed_experts}
        lengths = {name: getattr(self.args, name) for name in ("context", "prefill", "output")}
        settings = {"model": self.name} | sizes | lengths | settings
        append_record(self.args.out, make_record(sys.argv, self._device, settings, results))

    def _variant(self, off: tuple[str, ...]) -> dict[str, Any]:
        """One line: steps with what is in `off` off."""
        batch = self.args.batches[0]
        with unfused(off, self.network, self._experts):
            prefill_logits = self.engine.prefill_logits()
            decode_ms, decode_launches, decode_logits = self._decode(off, batch, checks=True)
            prefill_ms, prefill_launches = self._prefill(off)
        assert decode_logits is not None
        logits = decode_logits, prefill_logits
        more = self._noise(batch, logits) if not off else {}
        has_bf16 = BF16 in off
        expected = self._logits.get(has_bf16)
        if expected is None:
            self._logits[has_bf16] = logits
            expected = self._logits[False]
        errors = [median_row(*pair) for pair in zip(logits, expected, strict=True)]
        is_other = off == (BF16,)
        agrees = all(error <= bound for error, bound in zip(errors, self._bounds, strict=True))
        self.agrees &= agrees or is_other
        return {
            "decode_step_ms": middle(decode_ms),
            "decode_tokens_per_s": round(1e3 * batch / middle(decode_ms), 1),
            "decode_launches": decode_launches,
            "decode_error": _short(errors[0]),
            "prefill_ms": middle(prefill_ms),
            "prefill_tokens_per_s": round(1e3 * self.args.prefill / middle(prefill_ms), 1),
            "prefill_launches": prefill_launches,
            "prefill_error": _short(errors[1]),
            "agrees": None if is_other else agrees,
            "decode_times_ms": [round(each, 3) for each in decode_ms],
            "prefill_times_ms": [round(each, 3) for each in prefill_ms],
        } | more

    def _noise(self, batch: int, logits: tuple[Tensor, Tensor]) -> dict[str, float]:
        """What a rounding of its input does to the network, beside what others may do."""
        with self.engine.nudged(), self.engine.graph(self.engine.decode_bucket(batch), captured=False):
            nudged = self.engine.decode_logits(batch), self.engine.prefill_logits()
        errors = [median_row(*pair) for pair in zip(nudged, logits, strict=True)]
        self._bounds = [max(STEP_BOUND, error) for error in errors]
        return {
            f"{step}_noise": float(f"{error:.3g}") for step, error in zip(("decode", "prefill"), errors, strict=True)
        }

    def _decode(self, off: Collection[str], batch: int, checks: bool = False) -> tuple[list[float], int, Tensor | None]:
        captured = self.engine.is_cuda and "decode-graphs" not in off
        with self.engine.graph(self.engine.decode_bucket(batch), captured) as count:
            times = self.engine.decode_ms(batch, self.args.steps, self.args.repeats)
            return times, count(), self.engine.decode_logits(batch) if checks else None

    def _prefill(self, off: Collection[str]) -> tuple[list[float], int]:
        captured = self.engine.is_cuda and "prefill-graphs" not in off
        with self.engine.graph(self.engine.prefill_bucket, captured):
            times = self.engine.prefill_ms(max(1, self.args.steps // 10), self.args.repeats)
        with self.engine.graph(self.engine.prefill_bucket, captured=False) as count:  # the graph's memory is free again
            return times, count()

    def _compare(self) -> None:
        """The engine as it is against all off, at equal interactivity, and what each switch adds."""
        layout = CacheLayout.build(self.full, Numerics.OFFICIAL)
        num_tokens = self.args.prefill + self.args.output
        fits = requests_that_fit(layout, CACHE_BYTES, num_tokens)
        fits_day0 = day0_requests(self.full, CACHE_BYTES, num_tokens)
        on = self._side((), fits)
        sides = {off: self._side(off, fits_day0) for off in (self.everything, self.day0) if off in self.results}
        batches = sorted({batch for batch in FEW_REQUESTS if batch <= fits_day0} | {fits_day0})
        named = {"as it is": on} | {self._label(off): side for off, side in sides.items()}
        results = {
            "requests_that_fit": {"on": fits, "off": fits_day0},
            "bytes_of_a_request": {
                "on": layout.slot_bytes + -(-num_tokens // PAGE_TOKENS) * layout.page_bytes,
                "off": round(day0_token_bytes(self.full) * num_tokens),
            },
            "model_decode_ms": {name: side.decode_ms for name, side in named.items()},
            "model_prefill_ms": {name: side.prefill_ms for name, side in named.items()},
            "switches": self._contributions(),
            "equal_interactivity": {
                self._label(off): [at_equal_interactivity(on, side, batch) for batch in batches]
                for off, side in sides.items()
            },
        }
        self._record({"off": "compared", "cache_bytes": CACHE_BYTES}, results)
        print(table(self.name, results), flush=True)

    def _side(self, off: tuple[str, ...], most: int) -> Side:
        """Times of the whole model, of as many batch sizes as there is time for."""
        measured = self.results[off]
        sizes = [self.args.batches[0]]
        steps, prefill = {sizes[0]: measured["decode_step_ms"]}, measured["prefill_ms"]
        with unfused(off, self.network, self._experts):
            for batch in self.args.batches[1:]:
                if self._left() > VARIANT_SECONDS:
                    steps[batch] = middle(self._decode(off, batch)[0])
        with without_layers(self.network), unfused(off, self.network):
            rest = {batch: middle(self._decode(off, batch)[0]) for batch in steps}
            prefill_rest = middle(self._prefill(off)[0])
        scale = self.full.num_hidden_layers / self.network.config.num_hidden_layers

        def whole(step: float, without: float) -> float:
            return round(without + (step - without) * scale, 3)

        decode_ms = {batch: whole(steps[batch], rest[batch]) for batch in sorted(steps)}
        return Side(decode_ms, whole(prefill, prefill_rest), self.args.prefill, self.args.output, most)

    def _contributions(self) -> list[dict[str, Any]]:
        """How much longer steps of the slice take without each switch, and without all."""
        base = self.results[()]
        lines = []
        for off, results in self.results.items():
            if off:
                line: dict[str, Any] = {"off": self._label(off)}
                for name, field in (("decode", "decode_step_ms"), ("prefill", "prefill_ms")):
                    line[f"{name}_more_ms"] = round(results[field] - base[field], 3)
                    line[f"{name}_ratio"] = round(results[field] / base[field], 3)
                    line[f"{name}_launches"] = results[f"{name}_launches"]
                lines.append(line)
        return lines


@contextmanager
def without_layers(network: DeviceTransformer) -> Iterator[None]:
    """Inside, the network is embedding and head."""
    blocks, network.blocks = network.blocks, []
    try:
        yield
    finally:
        network.blocks = blocks


def _short(error: float) -> float | None:
    """Three digits; None for NaN, which is no JSON."""
    return float(f"{error:.3g}") if error == error else None


if __name__ == "__main__":
    sys.exit(main())
