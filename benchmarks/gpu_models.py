"""Engines on one GPU for the benchmarks beside this file: the demo checkpoint, and slices of Pro and Flash.

A slice has some layers of the model at full width, embedding and head, and random weights (`pro-slice` the first 4 of
61 layers, 59 GB of weights; `flash-slice` 12 of 43), so that one H100 runs true shapes. A slice's step is not a model's
step: per-layer costs add up, the head and the step's own costs do not.

`pro-rank` is what one of eight GPUs has that divide Pro's experts: layers 3 to 8, three of either ratio, with 48 of 384
experts. As many tokens meet an expert as with eight such ranks; their exchange is left out.
"""

from __future__ import annotations

import json
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsv4serve.config import Device, EngineConfig, LoadFormat, default_model
from dsv4serve.runner import build_runner
from dsv4serve.types import PAGE_TOKENS, Chunk, PageAppend, SamplingParams, SchedulerOutput, SlotStart, StepOutput


class Slice(NamedTuple):
    """Some layers of a released model."""

    model: str
    num_layers: int
    first: int = 0
    num_ranks: int = 1  # among which the routed experts are divided

    def full_config(self) -> dict[str, Any]:
        """config.json of the whole model."""
        return json.loads((resources.files("dsv4serve_configs") / "models" / f"{self.model}.json").read_text("utf-8"))

    def folder(self) -> Path:
        """A new folder with the slice's config.json, to be loaded with dummy weights."""
        raw = self.full_config()
        ratios, end = raw["compress_ratios"], self.first + self.num_layers
        raw["compress_ratios"] = ratios[self.first : end] + ratios[len(ratios) - raw["num_nextn_predict_layers"] :]
        raw["num_hidden_layers"] = self.num_layers
        raw["num_hash_layers"] = max(0, raw["num_hash_layers"] - self.first)
        raw["n_routed_experts"] //= self.num_ranks
        folder = Path(tempfile.mkdtemp(prefix=f"{self.model}-slice-"))
        (folder / "config.json").write_text(json.dumps(raw))
        return folder


SLICES = {
    "pro-slice": Slice("pro", 4),
    "pro-rank": Slice("pro", 6, first=3, num_ranks=8),
    "flash-slice": Slice("flash", 12),
}
MODELS = ("demo", *SLICES)


def engine_config(name: str, **settings: Any) -> EngineConfig:
    """Of one of MODELS on the GPU, unless `settings` say otherwise."""
    settings = {"device": Device.CUDA, **settings}
    if name == "demo":
        return EngineConfig(model=default_model(), **settings)
    return EngineConfig(model=SLICES[name].folder(), load_format=LoadFormat.DUMMY, **settings)


def build(name: str, **settings: Any) -> Driver:
    """The device engine of one of MODELS, kernels compiled and graphs captured."""
    begin = time.perf_counter()
    driver = Driver(build_runner(engine_config(name, **settings)))
    torch.cuda.synchronize()
    driver.start_s = time.perf_counter() - begin
    return driver


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

    def execute(self, **parts: Any) -> StepOutput:
        """One step."""
        self._step_id += 1
        return self.runner.execute(SchedulerOutput(step_id=self._step_id, **parts))

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

    def generate(self, ids: list[int], num_tokens: int) -> list[int]:
        """A greedy continuation in slot 0."""
        tokens = self.begin(0, ids)
        while len(tokens) < num_tokens:
            tokens += self.decode([0])
        return tokens
