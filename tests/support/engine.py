"""Scheduler and runner in one process, with poisoned memory, for comparing with the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.models import oracle_logits
from torch import Tensor

from dsv4_kernels.kv_store import Planes
from dsv4_kernels.metadata.plan import ACCEPTED
from dsv4serve.config import Numerics
from dsv4serve.constrained.vocabulary import Vocabulary, no_vocabulary
from dsv4serve.engine.pipeline import Pipeline
from dsv4serve.memory import CacheLayout, CapacityPlan
from dsv4serve.model.context import Observer
from dsv4serve.model.transformer import Transformer
from dsv4serve.runner import Runner
from dsv4serve.runner.drafts import Drafts
from dsv4serve.scheduler import Scheduler
from dsv4serve.scheduler.drafts import DraftPolicy
from dsv4serve.types import Request, RequestOutput, SamplingParams

TOLERANCE = 2e-4  # of float32 logits with standard deviation about 2


def greedy(request_id: str, prompt: list[int], max_tokens: int, **sampling: Any) -> Request:
    """A request that ignores EOS and returns its logits; greedy unless `sampling` says otherwise."""
    settings = {"temperature": 0.0, "ignore_eos": True, "return_logits": True, **sampling}
    return Request(request_id=request_id, prompt_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens, **settings))


Inject = Callable[[str, int, int], int]  # request id, index of the output, the block's own draft -> the draft


class InjectedDrafts(Drafts):
    """Drafts of greedy requests that a test chooses."""

    def __init__(self, engine: Engine, batch: list[int], counts: list[int], inject: Inject) -> None:
        super().__init__(engine.runner._slots, engine.runner._constraints, batch, counts)
        self._names = [engine.scheduler._running[slot].request_id for slot in batch]
        self._inject, self._seen = inject, engine.draft_logits

    def choose(self, places: list[int], logits: Tensor) -> Tensor:
        assert bool(torch.isfinite(logits).all())
        assert not self.sampled
        tokens = []
        for row, place in enumerate(places):
            name, index = self._names[place], self._slots.num_outputs[self.batch[place]]
            self._seen[name, index, self._num_made] = logits[row].clone()
            tokens.append(self._inject(name, index + self._num_made, int(logits[row].argmax())))
        chosen = torch.tensor(tokens)
        self._take(places, chosen)
        return chosen


class Engine:
    """Scheduler and runner. Every slot, page and tail is NaN whenever it belongs to nobody; with drafts, all that lies
    behind the positions that a slot has computed is NaN, too, between any two steps."""

    def __init__(
        self,
        transformer: Transformer,
        num_slots: int = 4,
        num_pages: int = 16,
        num_tails: int = 6,
        max_step_tokens: int = 512,
        max_model_len: int = 2048,
        prefix_cache: bool = True,
        read_vocabulary: Callable[[], Vocabulary] = no_vocabulary,
        num_draft_tokens: int = 0,
        adaptive: bool = False,
        inject: Inject | None = None,
        observer: Observer | None = None,
        on_device: bool = False,
    ) -> None:
        max_model_len = min(max_model_len, num_pages * 256)
        numerics = Numerics.EXACT if transformer.dtype == torch.float32 else Numerics.OFFICIAL
        layout = CacheLayout.build(transformer.config, numerics, num_draft_tokens)
        plan = CapacityPlan(layout, num_slots, num_pages, num_tails, max_model_len)
        if on_device:
            from dsv4serve.runner.device_runner import DeviceRunner

            self.runner = DeviceRunner(transformer, plan, max_step_tokens, read_vocabulary)
        else:
            self.runner = Runner(transformer, plan, observer, read_vocabulary)
        # Of injected drafts, by request, index of the output that a verify begins with, and place in the verify.
        self.draft_logits: dict[tuple[str, int, int], Tensor] = {}
        if inject is not None and on_device:
            self.runner.forward.drafter._choose = self._choose_injected(inject)
        elif inject is not None:
            self.runner._sampler.start_drafts = lambda batch, counts: InjectedDrafts(self, batch, counts, inject)
        self.outputs: dict[str, RequestOutput] = {}
        self.scheduler = Scheduler(
            num_slots=num_slots,
            num_pages=num_pages,
            num_tails=num_tails,
            max_model_len=max_model_len,
            max_step_tokens=max_step_tokens,
            eos_token_id=transformer.config.eos_token_id,
            prefix_cache=prefix_cache,
            max_waiting=10_000,
            drafts=DraftPolicy(num_draft_tokens, adaptive, self.runner.may_draft) if num_draft_tokens else None,
        )
        self._pipeline = Pipeline(self.scheduler, self.runner)

    def _choose_injected(self, inject: Inject) -> Callable[..., None]:
        """`Drafter._choose` of the device: the drafts that a test chooses."""

        def choose(place: int, logits: Tensor, requests: Any, out: Tensor) -> None:
            chosen = logits.argmax(-1)
            for row, (slot, num) in enumerate(zip(requests.slots.tolist(), requests.num_drafts.tolist(), strict=True)):
                if num > place:
                    assert bool(torch.isfinite(logits[row]).all())
                    state = self.scheduler._running[slot]
                    name, index = state.request_id, int(requests.starts[row]) + 1 - state.num_prompt
                    self.draft_logits[name, index, place] = logits[row].cpu().clone()
                    chosen[row] = inject(name, index + place, int(chosen[row]))
            out.copy_(chosen)

        return choose

    def _poison(self) -> None:
        """Overwrite what is free: byte 255 is NaN in float32, E4M3 and E8M0."""
        pools, scheduler = self.runner.pools, self.scheduler
        slots, pages, tails = (
            [item for item in range(pool.size) if pool.count(item) == 0]
            for pool in (scheduler._slots, scheduler._pages, scheduler._tails)
        )
        pools.streams[slots] = 255
        pools._tail_streams[tails] = 255
        for layer, tail_rings in zip(pools.layers, pools._tail_rings, strict=True):
            for ring in layer.rings():
                ring.view(pools.num_slots + 1, -1)[slots] = 255
            for ring in tail_rings:
                ring[tails] = 255
            if layer.c128_state is not None:
                layer.c128_state[slots] = torch.nan
            for plane in (layer.entries or ()) + (layer.index or ()):
                plane.view(pools.num_pages + 1, -1)[pages] = 255

    def _poison_uncommitted(self) -> None:
        """Overwrite what no later row of a running request may read: ring rows outside of the window that the next row
        sees, states of drafts, entries of blocks that are not complete."""
        pools, layout, slots = self.runner.pools, self.runner.pools.layout, self.runner._slots
        window = layout.window_ring_rows - layout.num_draft_tokens
        mtp = len(pools.layers) - 1
        unseen = getattr(self.runner, "unseen", ())  # of a device, whose steps end later
        for slot, state in self.scheduler._running.items():
            num = slots.num_computed[slot]
            if slot in unseen:  # what the host will know, the device knows
                num += int(self.runner.forward.left[ACCEPTED, slot])
            for index, layer in enumerate(pools.layers):
                # The MTP block stands one row behind.
                next_row = num - 1 if index == mtp else num
                live = range(max(next_row - window + 1, 0), max(next_row, 0))
                _poison_ring(layer.window, slot, layout.window_ring_rows, live)
                for ring in (layer.c4_state, layer.index_state):
                    if ring is not None:
                        _poison_ring(ring, slot, layout.c4_ring_rows, range(max(num - num % 4 - 4, 0), num))
                if layer.c128_state is not None:
                    layer.c128_state[slot, 1 if num % 128 else 0 :] = torch.nan
                per_page = layer.layout.entries_per_page
                for plane in (layer.entries or ()) + (layer.index or ()):
                    for number, page in enumerate(state.pages):
                        complete = num // layer.layout.ratio - number * per_page
                        if complete < per_page:
                            plane[page * per_page + max(complete, 0) : (page + 1) * per_page] = 255

    def run(
        self,
        requests: list[Request],
        arrivals: dict[str, int] | None = None,
        aborts: dict[str, int] | None = None,
    ) -> dict[str, RequestOutput]:
        """Serve `requests`, each added and aborted before the step named for it; outputs merged per request."""
        arrivals, aborts = arrivals or {}, dict(aborts or {})
        pending = sorted(requests, key=lambda request: arrivals.get(request.request_id, 0))
        step = 0
        while pending or self._pipeline.has_work:
            while pending and arrivals.get(pending[0].request_id, 0) <= step:
                self.add(pending.pop(0))
            for name in [name for name, when in aborts.items() if when <= step]:
                del aborts[name]
                self.abort(name)
            self.step()
            step += 1
            assert step < 5000, "the engine makes no progress"
        return {request.request_id: self.outputs[request.request_id] for request in requests}

    def add(self, request: Request) -> None:
        """Queue a request; what comes of it is merged in `outputs`."""
        self.scheduler.add(request)
        self.outputs[request.request_id] = RequestOutput(request_id=request.request_id)

    def abort(self, name: str) -> None:
        """End a request, if it is open."""
        ended = self.scheduler.abort(name)
        if ended is not None:
            _merge(self.outputs[name], ended)

    def step(self) -> None:
        """Submit a step, if there is anything to run, and take a result when no more may run ahead of it."""
        self._poison()
        if self.runner.pools.layout.num_draft_tokens:
            self._poison_uncommitted()
        step = self._pipeline.step()
        if step is None:
            return
        for output in self.scheduler.update(step.planned, step.result):
            _merge(self.outputs[output.request_id], output)


def _poison_ring(ring: Planes, slot: int, ring_rows: int, live: range) -> None:
    dead = sorted(set(range(ring_rows)) - {position % ring_rows for position in live})
    for plane in ring:
        plane.view(-1, ring_rows, plane.shape[1])[slot, dead] = 255


def _merge(total: RequestOutput, part: RequestOutput) -> None:
    assert total.finish_reason is None, f"{part.request_id} has output after its end"
    total.token_ids = total.token_ids + part.token_ids
    total.logits = [*total.logits, *part.logits]
    total.prompt_logits = [*total.prompt_logits, *part.prompt_logits]
    total.logprobs = [*total.logprobs, *part.logprobs]
    total.prompt_logprobs = [*total.prompt_logprobs, *part.prompt_logprobs]
    total.finish_reason = part.finish_reason
    if part.num_cached_tokens is not None:
        assert total.num_cached_tokens is None
        total.num_cached_tokens = part.num_cached_tokens


def check_outputs(transformer: Transformer, requests: list[Request], outputs: dict[str, RequestOutput]) -> None:
    """Every generated token is the argmax of its row (if greedy), every row is the oracle's on the same history."""
    for request in requests:
        output = outputs[request.request_id]
        if not output.token_ids:
            continue
        rows = torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float32) for row in output.logits])
        assert len(rows) == len(output.token_ids)
        if request.sampling.temperature == 0:
            assert rows.argmax(-1).tolist() == output.token_ids
        expected = oracle_logits(transformer, request.prompt_ids + output.token_ids[:-1])[len(request.prompt_ids) - 1 :]
        assert (rows - expected).abs().max().item() < TOLERANCE, request.request_id
