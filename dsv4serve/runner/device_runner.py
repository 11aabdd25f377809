"""The runner on a GPU. Slots, tails, requests and answers are those of `Runner`; the forward is the device's.

A step replays a graph and samples on the device; the host submits the next one before it reads back the tokens, one for
each request. A request that wants more of its logits than a token (penalties, bias, bans, a grammar, log probabilities)
sends its step's logits to the host, where `Sampler` does what it does on CPU; the next step is submitted after that.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from dsv4_kernels.sampling import NonFiniteLogits, uniform
from dsv4serve.constrained.vocabulary import Vocabulary, no_vocabulary
from dsv4serve.memory import CapacityPlan
from dsv4serve.model.device import DeviceTransformer, Streams
from dsv4serve.runner.device_batch import LAST_TOKEN, BatchOutput, DeviceForward
from dsv4serve.runner.graphs import StepGraphs, max_step_rows
from dsv4serve.runner.runner import Runner
from dsv4serve.runner.sampler import row_bytes
from dsv4serve.types import PAGE_TOKENS, PageAppend, SchedulerOutput, StepOutput


class DeviceRunner(Runner):
    """Runs steps over a cache on the device of `transformer`, one at a time there, one ahead of the host.

    Args:
        plan: a layout of official formats without drafts.
        max_step_tokens: as the scheduler has it.
    """

    steps_ahead = 1

    def __init__(
        self,
        transformer: DeviceTransformer,
        plan: CapacityPlan,
        max_step_tokens: int,
        read_vocabulary: Callable[[], Vocabulary] = no_vocabulary,
    ) -> None:
        assert not plan.layout.num_draft_tokens, "the device engine has no drafts"
        super().__init__(transformer, plan, read_vocabulary=read_vocabulary)
        max_pages = -(-plan.max_model_len // PAGE_TOKENS)
        self.forward = DeviceForward(transformer, self.pools, max_pages)
        self.graphs = StepGraphs(self.forward, plan.num_slots, max_step_rows(max_step_tokens, plan.num_slots))
        self._max_pages = max_pages
        self._new_pages: dict[int, int] = {}  # by place in the page table, to be written before the next forward
        self._end_last: Callable[[], object] = _nothing  # of the step before: what the host has to decide

    def submit(self, output: SchedulerOutput) -> Callable[[], StepOutput]:
        """Begin a step on the device. See Runner.submit."""
        self._end_last()
        return super().submit(output)

    def _append(self, append: PageAppend) -> None:
        first = append.slot * self._max_pages + self._slots.append(append)
        self._new_pages |= enumerate(append.pages, start=first)

    def _logits(self, streams: Streams) -> Tensor:
        """Float32 logits on the host."""
        return self.transformer.logits(streams).cpu()

    def _begin(self, output: SchedulerOutput, begin: float) -> Callable[[], StepOutput]:
        result = StepOutput(step_id=output.step_id)
        if not output.num_tokens:
            return lambda: result
        slots, chunks = self._slots, output.chunks
        batch = [chunk.slot for chunk in chunks] + output.decodes
        counts = [len(chunk.token_ids) for chunk in chunks] + [1] * len(output.decodes)
        ids = [token for chunk in chunks for token in chunk.token_ids] + [LAST_TOKEN] * len(output.decodes)
        prompt_rows = self._prompt_rows(chunks)
        has_logprobs = any(slots.params(chunk.slot).num_prompt_logprobs is not None for chunk in chunks)
        columns = self._columns(batch, counts)
        if self._new_pages:
            self.forward.append_pages(list(self._new_pages), list(self._new_pages.values()))
            self._new_pages = {}
        computed = self.graphs.run(columns, ids, keeps_rows=has_logprobs or bool(prompt_rows))
        result.prepare_s = perf_counter() - begin
        if computed.rows is not None:
            self._prompt_logprobs(computed.rows, chunks, result)
            for slot, rows in prompt_rows.items():
                index = torch.tensor(rows, device=self.forward.device)
                result.prompt_logits[slot] = row_bytes(self._logits(computed.rows[index]))
        for slot, count in zip(batch, counts, strict=True):
            slots.num_computed[slot] += count
        samples = [chunk.samples for chunk in chunks] + [True] * len(output.decodes)
        places = [place for place, wanted in enumerate(samples) if wanted]
        return self._sample(computed, places, [batch[place] for place in places], result)

    def _columns(self, batch: list[int], counts: list[int]) -> dict[str, list[int] | list[float]]:
        """INPUTS of the step's requests."""
        slots = self._slots
        params = [slots.params(slot) for slot in batch]
        return {
            "slot": batch,
            "start": [slots.num_computed[slot] for slot in batch],
            "count": counts,
            "top_k": [p.top_k for p in params],
            "temperature": [p.temperature for p in params],
            "top_p": [p.top_p for p in params],
            "min_p": [p.min_p for p in params],
            "uniform": [uniform(p.seed, slots.num_outputs[slot]) for p, slot in zip(params, batch, strict=True)],
        }

    def _sample(
        self, computed: BatchOutput, places: list[int], sampling: list[int], result: StepOutput
    ) -> Callable[[], StepOutput]:
        """Take the tokens of the requests at `places` of the batch, in the slots `sampling`, when they are there."""
        if not places:
            return lambda: result
        if all(map(self._is_plain, sampling)):
            tokens, arrived = _read_back(computed.tokens)
            for slot in sampling:
                self._slots.num_outputs[slot] += 1  # the next step counts on it

            def read() -> StepOutput:
                arrived()
                begin = perf_counter()
                chosen = tokens[places].tolist()
                if -1 in chosen:
                    raise NonFiniteLogits([row for row, token in enumerate(chosen) if token == -1])
                result.slots, result.token_ids = sampling, [[token] for token in chosen]
                result.sample_s = perf_counter() - begin
                return result

            return read

        @torch.inference_mode()
        def draw() -> StepOutput:
            if self._end_last is draw:
                self._end_last = _nothing
                logits = computed.logits[torch.tensor(places, device=self.forward.device)].cpu()
                begin = perf_counter()
                self._sampler.draw(logits, sampling, result)
                self.forward.set_last_tokens(result.slots, [tokens[-1] for tokens in result.token_ids])
                result.sample_s = perf_counter() - begin
            return result

        self._end_last = draw
        return draw

    def _is_plain(self, slot: int) -> bool:
        """The request wants nothing but a token."""
        params = self._slots.params(slot)
        wants_logits = params.return_logits or params.num_logprobs is not None or params.constraint is not None
        return self._slots.adjustments[slot] is None and not wants_logits


def _read_back(tokens: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy on the host that the device will have written when the call returns."""
    if tokens.device.type == "cpu":
        return tokens.clone(), lambda: None
    copy = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    copy.copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event.synchronize


def _nothing() -> None:
    """There was no step before, or the host has nothing to decide of it."""
