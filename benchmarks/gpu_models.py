"""Engines on one GPU for the benchmarks beside this file: the demo checkpoint, and slices of Pro and Flash.

A slice has the first layers of the model at full width, embedding and head, and random weights (`pro-4` 4 of 61 layers,
59 GB of weights; `flash-12` 12 of 43), so that one H100 runs true shapes. A slice's step is not a model's step:
per-layer costs add up, the head and the step's own costs do not.

`pro-rank` is what one of eight GPUs has that divide Pro's experts: layers 3 to 8, three of either ratio, with 48 of 384
experts. As many tokens meet an expert as with eight such ranks; their exchange is left out. `pro-deep` is the same with
layers 3 to 26, so that MTP block and head are a small part of a step, as they are of the model's.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from dsv4serve.config import Device, EngineConfig, LoadFormat, default_model
from dsv4serve.obs.kernels import kernels
from dsv4serve.runner import build_runner
from dsv4serve.types import PAGE_TOKENS, Chunk, PageAppend, SamplingParams, SchedulerOutput, SlotStart, StepOutput

SLICES = {"pro-slice": "pro-4", "flash-slice": "flash-12", "pro-rank": "pro-3:9/8", "pro-deep": "pro-3:27/8"}
SLICE = re.compile(r"(\w+)-(?:(\d+):)?(\d+)(?:/(\d+))?")  # model, first layer, end, ranks that divide its experts
MODELS = ("demo", *SLICES)


def engine_config(name: str, **settings: Any) -> EngineConfig:
    """Of one of MODELS, or of a slice by name and layers ("pro-8"), on the GPU, unless `settings` say otherwise."""
    settings = {"device": Device.CUDA, **settings}
    if name == "demo":
        return EngineConfig(model=default_model(), **settings)
    folder = Path(tempfile.mkdtemp(prefix="slice-"))
    (folder / "config.json").write_text(json.dumps(slice_config(name)))
    return EngineConfig(model=folder, load_format=LoadFormat.DUMMY, **settings)


def whole_config(name: str) -> dict[str, Any]:
    """config.json of the model that the slice is of."""
    model = SLICES.get(name, name).partition("-")[0]
    return json.loads((resources.files("dsv4serve_configs") / "models" / f"{model}.json").read_text("utf-8"))


def slice_config(name: str) -> dict[str, Any]:
    """config.json of a slice. Raises ValueError for other names."""
    match = SLICE.fullmatch(SLICES.get(name, name))
    if match is None:
        raise ValueError(f"{name!r} is no slice; allowed: {', '.join(SLICES)}, or as pro-8 or pro-3:9/8")
    first, end, num_ranks = int(match[2] or 0), int(match[3]), int(match[4] or 1)
    raw = whole_config(name)
    ratios = raw["compress_ratios"]
    raw["compress_ratios"] = ratios[first:end] + ratios[len(ratios) - raw["num_nextn_predict_layers"] :]
    raw["num_hidden_layers"] = end - first
    raw["num_hash_layers"] = max(0, raw["num_hash_layers"] - first)
    raw["n_routed_experts"] //= num_ranks
    return raw


def build(name: str, **settings: Any) -> Driver:
    """The device engine of a model as `engine_config` names it, kernels compiled and graphs captured."""
    begin = time.perf_counter()
    driver = Driver(build_runner(engine_config(name, **settings)))
    torch.cuda.synchronize()
    driver.start_s = time.perf_counter() - begin
    return driver


def start_results(start_s: float) -> dict[str, Any]:
    """What a record says of the start of its process's only engine, which took `start_s`: seconds from the start of the
    process until it was ready, and the kernels that were compiled or loaded from the cache before that and since."""
    return {
        "start_s": round(start_s, 1),
        "ready_s": round(kernels.ready_s, 1),
        "kernels_made": {
            phase: {"compiled": counts.compiled, "loaded": counts.loaded, "seconds": round(counts.seconds, 2)}
            for phase, counts in kernels.phases.items()
        },
    }


class Driver:
    """Plans steps for a runner by hand: each slot has its own pages, and no request ever ends."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.start_s = runner, 0.0
        self._step_id = 0
        self._pages_each = min(runner.num_pages // runner.num_slots, -(-runner.max_model_len // PAGE_TOKENS))

    @property
    def longest(self) -> int:
        """Tokens that a slot's pages hold."""
        return self._pages_each * PAGE_TOKENS

    def submit(self, **parts: Any) -> Callable[[], StepOutput]:
        """Begin a step; the result waits for its end."""
        self._step_id += 1
        return self.runner.submit(SchedulerOutput(step_id=self._step_id, **parts))

    def execute(self, **parts: Any) -> StepOutput:
        """One step."""
        return self.submit(**parts)()

    def begin(self, slot: int, ids: list[int], context: int = 0) -> list[int]:
        """Start a greedy request with all pages of its slot, and its prompt as one chunk; returns the first token.

        With `context`, a multiple of PAGE_TOKENS, so many positions before the chunk count as computed. What the cache
        holds for them is whatever is there: for times, not for answers.
        """
        start = SlotStart(
            slot=slot,
            request_id=f"r{slot}",
            sampling=SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True),
            num_computed_tokens=context,
            num_prompt_tokens=context + len(ids),
        )
        pages = PageAppend(slot, list(range(slot * self._pages_each, (slot + 1) * self._pages_each)))
        chunk = Chunk(slot=slot, token_ids=ids, samples=True)
        return self.execute(starts=[start], page_appends=[pages], chunks=[chunk]).token_ids[0]

    def decode(self, slots: list[int]) -> list[int]:
        """One token for each slot."""
        return [tokens[0] for tokens in self.execute(decodes=slots).token_ids]

    def decode_ms(self, slots: list[int], num_steps: int) -> float:
        """Mean time of a decode step, each submitted while the one before it runs."""
        for _ in range(3):
            self.decode(slots)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        last = self.submit(decodes=slots)
        for _ in range(num_steps - 1):
            following = self.submit(decodes=slots)
            last()
            last = following
        last()
        return (time.perf_counter() - begin) / num_steps * 1e3

    def generate(self, ids: list[int], num_tokens: int, eos_id: int) -> list[int]:
        """A greedy continuation in slot 0, to EOS at most."""
        tokens = self.begin(0, ids)
        while len(tokens) < num_tokens and tokens[-1] != eos_id:
            tokens += self.decode([0])
        return tokens
