"""The device engine as ablation.py times it: filled slots, steps one ahead of the host, graphs of chosen steps only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from gpu_models import engine_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction
from unfused import Experts

from dsv4_kernels.mega_moe.weights import form_for
from dsv4serve.config import ModelConfig, Numerics
from dsv4serve.memory import CacheLayout, CapacityPlan
from dsv4serve.model.device import DeviceTransformer
from dsv4serve.runner.device_runner import DeviceRunner
from dsv4serve.runner.graphs import StepGraphs, bucket_for, max_step_rows
from dsv4serve.types import PAGE_TOKENS, Chunk, PageAppend, SamplingParams, SchedulerOutput, SlotStart
from dsv4serve.weights.device_loader import load_device_weights

GREEDY = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)
CHECKED = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True, return_logits=True)
CHECK_SLOTS = 16  # whose logits are compared
CHECK_STEPS = 4  # of decodes; in one of four the requests close an entry


def build_network(name: str) -> DeviceTransformer:
    """The network of a slice of gpu_models.py on the GPU, without a cache."""
    config = engine_config(name)
    model, device = ModelConfig.load(config.model), torch.device("cuda", torch.cuda.current_device())
    form = form_for("fp8", torch.cuda.get_device_capability(device)[0])
    return DeviceTransformer(model, load_device_weights(config, model, device, form))


def bf16_experts(name: str, network: DeviceTransformer) -> list[Experts]:
    """Routed experts of the network's blocks in the form `bf16`, of the same dummy weights; none if the network's have
    that form, or where a second set of all weights would take more than half of the GPU."""
    device = network.device
    total = torch.cuda.get_device_properties(device).total_memory
    if network.blocks[0].moe.w13.form == "bf16" or 4 * torch.cuda.memory_allocated(device) > total:
        return []
    weights = load_device_weights(engine_config(name), network.config, device, "bf16")
    experts = [f"layers.{layer}.ffn.experts." for layer in range(len(network.blocks))]
    return [(weights[prefix + "w13"], weights[prefix + "w2"]) for prefix in experts]


class AblationEngine:
    """Two runners over one network: `most` slots that stand at `context` tokens and decode, and one that prefills.

    Args:
        context: tokens before the decodes, a multiple of PAGE_TOKENS; computed once, for one slot, whose cache all get.
        prefill: tokens of the prefill.
        num_output: tokens that the decoding slots have room for.
    """

    def __init__(self, network: DeviceTransformer, most: int, context: int, prefill: int, num_output: int) -> None:
        self.network, self.context, self.prefill = network, context, prefill
        self.is_cuda = network.device.type == "cuda"
        self.decoder = self._runner(most, context + num_output, prefill)
        self.prefiller = self._runner(1, prefill, prefill)
        self._step_id = 0
        generator = torch.Generator().manual_seed(1)
        vocab_size = network.config.vocab_size
        self._prompt = torch.randint(2, vocab_size, (max(prefill, context),), generator=generator).tolist()
        self._inputs = torch.randint(2, vocab_size, (CHECK_STEPS, most), generator=generator).tolist()
        self._rings: list[Tensor] = []
        if context:
            self._fill()

    def _runner(self, num_slots: int, num_tokens: int, max_step_tokens: int) -> DeviceRunner:
        pages = -(-num_tokens // PAGE_TOKENS)
        layout = CacheLayout.build(self.network.config, Numerics.OFFICIAL)
        plan = CapacityPlan(layout, num_slots, num_slots * pages, 1, pages * PAGE_TOKENS)
        return DeviceRunner(self.network, plan, max_step_tokens)

    def _output(self, **parts: Any) -> SchedulerOutput:
        self._step_id += 1
        return SchedulerOutput(step_id=self._step_id, **parts)

    def _start(
        self, runner: DeviceRunner, slot: int, sampling: SamplingParams, computed: int, prompt: int
    ) -> dict[str, Any]:
        """Parts of a step in which a slot begins, with all its pages."""
        each = runner.num_pages // runner.num_slots
        start = SlotStart(
            slot=slot,
            request_id=f"r{slot}",
            sampling=sampling,
            num_computed_tokens=computed,
            num_prompt_tokens=prompt,
        )
        return {"starts": [start], "page_appends": [PageAppend(slot, list(range(slot * each, (slot + 1) * each)))]}

    @torch.inference_mode()
    def _fill(self) -> None:
        """Compute the context in slot 0, and give its pages to all."""
        runner, pools = self.decoder, self.decoder.pools
        parts = self._start(runner, 0, GREEDY, 0, self.context)
        for first in range(0, self.context, self.prefill):
            ids = self._prompt[first : first + self.prefill][: self.context - first]
            runner.execute(self._output(chunks=[Chunk(slot=0, token_ids=ids, samples=False)], **parts))
            parts = {}
        self._rings = pools.copy_slots(torch.tensor([0]))
        for layer in pools.layers:
            for plane in (*(layer.entries or ()), *(layer.index or ())):
                pages = plane.view(pools.num_pages + 1, -1)[:-1].unflatten(0, (pools.num_slots, -1))
                pages[1:] = pages[0]

    @torch.inference_mode()
    def _reset(self, batch: int, num_checked: int = 0) -> None:
        """Slots 0 .. batch - 1 stand at the context again; the first of them return their logits."""
        for slot in range(batch):
            sampling = CHECKED if slot < num_checked else GREEDY
            parts = self._start(self.decoder, slot, sampling, self.context, self.context + 1)
            self.decoder.execute(self._output(**parts))
        slots = torch.arange(batch)
        if self._rings:
            rings = [ring.expand(batch, *ring.shape[1:]) for ring in self._rings]
            self.decoder.pools.put_slots(slots, rings)
        self.decoder.forward.set_last_tokens(slots.tolist(), self._inputs[0][:batch])

    def decode_bucket(self, batch: int) -> tuple[DeviceRunner, list[int]]:
        """Runner, and rows of each request of a decode step."""
        return self.decoder, [1] * batch

    @property
    def prefill_bucket(self) -> tuple[DeviceRunner, list[int]]:
        """The same of the prefill."""
        return self.prefiller, [self.prefill]

    @contextmanager
    def graph(self, bucket: tuple[DeviceRunner, list[int]], captured: bool) -> Iterator[Callable[[], int]]:
        """Inside, the bucket's steps replay a graph if `captured`, else run eagerly, as all other steps do.

        Gives a function that counts the launches of such a step, run eagerly without any request.
        """
        runner, counts = bucket
        padded = bucket_for(counts, runner.num_slots)

        def graphs() -> StepGraphs:
            max_rows = max_step_rows(sum(counts), runner.num_slots, num_draft_tokens=0)
            made = StepGraphs(runner.forward, runner.num_slots, max_rows, num_draft_tokens=0)
            made.buckets = [padded]
            return made

        @torch.inference_mode()
        def count() -> int:
            empty = graphs()
            empty.fill(padded, {}, [])
            with counted_launches() as launches:
                empty.eager(padded)
            return launches.number

        runner.graphs = graphs()
        if captured:
            runner.graphs.capture()
        yield count
        runner.graphs = graphs()  # the memory of the captured one is free
        if self.is_cuda:
            torch.cuda.empty_cache()

    def decode_ms(self, batch: int, num_steps: int, repeats: int) -> list[float]:
        """Milliseconds of a step of `batch` decodes behind the context, once for each repetition of `num_steps`."""
        self._reset(batch)
        slots = list(range(batch))
        self._seconds(self.decoder, (self._output(decodes=slots) for _ in range(min(2, num_steps))))
        times = []
        for _ in range(repeats):
            seconds = self._seconds(self.decoder, (self._output(decodes=slots) for _ in range(num_steps)))
            times.append(1e3 * seconds / num_steps)
        return times

    def prefill_ms(self, num_steps: int, repeats: int) -> list[float]:
        """Milliseconds of a step that prefills one request."""
        times = []
        for _ in range(repeats + 1):  # the first one warms up
            seconds = self._seconds(self.prefiller, (self._prefill(GREEDY) for _ in range(num_steps)))
            times.append(1e3 * seconds / num_steps)
        return times[1:]

    def _prefill(self, sampling: SamplingParams) -> SchedulerOutput:
        chunk = Chunk(slot=0, token_ids=self._prompt[: self.prefill], samples=True)
        return self._output(chunks=[chunk], **self._start(self.prefiller, 0, sampling, 0, self.prefill))

    def _seconds(self, runner: DeviceRunner, outputs: Iterable[SchedulerOutput]) -> float:
        """Of steps that are submitted before the result of the one before is taken, as the engine does."""
        self._wait()
        begin = time.perf_counter()
        take_last: Callable[[], object] | None = None
        for output in outputs:
            take = runner.submit(output)
            if take_last is not None:
                take_last()
            take_last = take
        assert take_last is not None
        take_last()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def decode_logits(self, batch: int) -> Tensor:
        """float32 [CHECK_STEPS * checked slots, vocab] of decodes of the same tokens whatever is sampled."""
        num_checked = min(batch, CHECK_SLOTS)
        self._reset(batch, num_checked)
        slots, rows = list(range(batch)), []
        for ids in self._inputs:
            self.decoder.forward.set_last_tokens(slots, ids[:batch])
            result = self.decoder.execute(self._output(decodes=slots))
            rows += [_row(result.logits[slot][0]) for slot in range(num_checked)]
        return torch.stack(rows)

    @contextmanager
    def nudged(self) -> Iterator[None]:
        """Inside, half of the embedding's values have another last bit: what a rounding of the network's input does."""
        embedding = self.network.embedding
        generator = torch.Generator(embedding.device).manual_seed(2)
        bits = torch.randint(2, embedding.shape, dtype=torch.int16, device=embedding.device, generator=generator)
        self.network.embedding = bits.bitwise_xor_(embedding.view(torch.int16)).view(embedding.dtype)
        try:
            yield
        finally:
            self.network.embedding = embedding

    def prefill_logits(self) -> Tensor:
        """float32 [rows, vocab] behind the last 64 tokens of the prefill, which then runs eagerly."""
        wanted = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, num_prompt_logits=64)
        result = self.prefiller.execute(self._prefill(wanted))
        return torch.stack([_row(row) for row in result.prompt_logits[0]])


def _row(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.float32).copy())


def middle(times: list[float]) -> float:
    """The median, rounded to microseconds."""
    return round(median(times), 3)


class _Launches(TorchDispatchMode):
    """Counts what would be kernels: torch's operations that are no views, and Triton's launches."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.in_triton = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or self.in_triton or "empty" in func.overloadpacket.__name__):
            self.number += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_launches() -> Iterator[_Launches]:
    """Inside, launches are counted on the host."""
    counts = _Launches()

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            counts.number += 1
            counts.in_triton = True  # the interpreter uses torch
            try:
                return run(kernel, *args, **kwargs)
            finally:
                counts.in_triton = False

        return replacement

    kind: Any = JITFunction
    if triton.knobs.runtime.interpret:
        from triton.runtime.interpreter import InterpretedFunction

        kind = InterpretedFunction
    with mock.patch.object(kind, "run", counting(kind.run)), counts:
        yield counts
