"""The runner on a GPU. Slots, tails, requests and answers are those of `Runner`; the forward is the device's.

A step replays a graph, makes drafts and samples on the device; the host submits the next one before it reads back the
tokens. How many drafts were accepted is not known then: the device adds them to where the request goes on. Of a request
that wants more of its logits than tokens (penalties, bias, bans, a grammar, log probabilities) the row comes to the
host, where `Sampler` does what it does on CPU, before the next step is submitted. It gets no drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from dsv4_kernels.metadata.plan import LAST_TOKEN
from dsv4_kernels.sampling import NonFiniteLogits, signed
from dsv4serve.constrained.vocabulary import Vocabulary, no_vocabulary
from dsv4serve.memory import CapacityPlan
from dsv4serve.model.device import DeviceTransformer, Streams
from dsv4serve.runner.device_batch import BatchOutput, DeviceForward
from dsv4serve.runner.graphs import StepGraphs, max_step_rows
from dsv4serve.runner.logprobs import BLOCK_ROWS
from dsv4serve.runner.runner import Runner
from dsv4serve.runner.sampler import row_bytes
from dsv4serve.types import PAGE_TOKENS, PageAppend, SamplingParams, SchedulerOutput, StepOutput


class DeviceRunner(Runner):
    """Runs steps over a cache on the device of `transformer`, one at a time there, one ahead of the host.

    Args:
        plan: a layout of official formats; with room for drafts only if the transformer has an MTP block.
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
        super().__init__(transformer, plan, read_vocabulary=read_vocabulary)
        max_pages = -(-plan.max_model_len // PAGE_TOKENS)
        num_drafts = plan.layout.num_draft_tokens
        self.forward = DeviceForward(transformer, self.pools, max_pages)
        max_rows = max_step_rows(max_step_tokens, plan.num_slots, num_drafts)
        self.graphs = StepGraphs(self.forward, plan.num_slots, max_rows, num_drafts)
        self._max_pages = max_pages
        self._new_pages: dict[int, int] = {}  # by place in the page table, to be written before the next forward
        self._end_last: Callable[[], object] = _nothing  # of the step before: what the host has to decide
        self._verifying: dict[int, set[int]] = {}  # by step under way: slots whose drafts it judges

    @torch.inference_mode()
    def make_ready(self, progress: bool = False) -> None:
        """Run every form of every kernel, and capture the steps' graphs: nothing is compiled behind this."""
        self.graphs.capture(progress)
        rows = self.graphs.eager(self.graphs.buckets[0], keeps_rows=True).rows
        assert rows is not None
        self._logits(rows)

    def may_draft(self, params: SamplingParams) -> bool:
        """See the protocol: what the host does to logits is done to rows without drafts only."""
        return super().may_draft(params) and params.wants_only_tokens

    def submit(self, output: SchedulerOutput) -> Callable[[], StepOutput]:
        """Begin a step on the device. See Runner.submit."""
        self._end_last()
        for slots in self._verifying.values():
            slots.difference_update(start.slot for start in output.starts)  # those requests have ended
        return super().submit(output)

    @property
    def unseen(self) -> set[int]:
        """Slots of which the host does not know yet how many drafts were accepted; the positions and outputs that it
        counts are without these."""
        return set().union(*self._verifying.values())

    def _make_chain(self) -> None:
        """The device makes its drafts itself."""

    def _append(self, append: PageAppend) -> None:
        first = append.slot * self._max_pages + self._slots.append(append)
        self._new_pages |= enumerate(append.pages, start=first)

    def _logits(self, streams: Streams) -> Tensor:
        """Float32 logits on the host. Always computed for BLOCK_ROWS rows, the last one repeated: other numbers of rows
        have other forms of the kernels, which `make_ready` would have to run too."""
        num_rows = len(streams.streams)
        blocks = []
        for first in range(0, num_rows, BLOCK_ROWS):
            rows = torch.arange(first, first + BLOCK_ROWS, device=self.forward.device).clamp_(max=num_rows - 1)
            blocks.append(self.transformer.logits(streams[rows])[: num_rows - first].cpu())
        return torch.cat(blocks)

    def _begin(self, output: SchedulerOutput, begin: float) -> Callable[[], StepOutput]:
        result = StepOutput(step_id=output.step_id)
        if not output.num_tokens:
            return lambda: result
        slots, chunks, verifies = self._slots, output.chunks, output.verifies
        num_drafts = [verify.num_draft_tokens for verify in verifies]
        batch = [chunk.slot for chunk in chunks] + output.decodes
        counts = [len(chunk.token_ids) for chunk in chunks] + [1] * len(output.decodes)
        num_plain = len(batch)
        batch += [verify.slot for verify in verifies]
        ids = [token for chunk in chunks for token in chunk.token_ids]
        ids += [LAST_TOKEN] * (len(output.decodes) + len(verifies) + sum(num_drafts))
        prompt_rows = self._prompt_rows(chunks)
        has_logprobs = any(slots.params(chunk.slot).num_prompt_logprobs is not None for chunk in chunks)
        columns = self._columns(batch, counts + [1 + num for num in num_drafts], [0] * num_plain + num_drafts)
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
        for slot, count in zip(batch, counts + [1] * len(verifies), strict=True):
            slots.num_computed[slot] += count
        self._verifying[output.step_id] = set(batch[num_plain:])
        samples = [chunk.samples for chunk in chunks] + [True] * (len(batch) - len(chunks))
        return self._sample(computed, {slot: at for at, slot in enumerate(batch) if samples[at]}, result)

    def _columns(
        self, batch: list[int], counts: list[int], num_drafts: list[int]
    ) -> dict[str, list[int] | list[float]]:
        """Inputs of the step's requests."""
        slots, unseen = self._slots, self.unseen
        params = [slots.params(slot) for slot in batch]
        return {
            "slot": batch,
            "start": [slots.num_computed[slot] for slot in batch],
            "count": counts,
            "num_drafts": num_drafts,
            "top_k": [p.top_k for p in params],
            "seed": [signed(p.seed) for p in params],
            "index": [slots.num_outputs[slot] for slot in batch],
            "follows": [slot in unseen for slot in batch],
            "temperature": [p.temperature for p in params],
            "top_p": [p.top_p for p in params],
            "min_p": [p.min_p for p in params],
        }

    def _sample(self, computed: BatchOutput, places: dict[int, int], result: StepOutput) -> Callable[[], StepOutput]:
        """Take the new tokens of the slots at these places of the batch, when they are there.

        Those of requests that want more of their logits than a token are chosen here, before the next step begins.
        """
        plain = {slot: place for slot, place in places.items() if self._is_plain(slot)}
        others = {slot: place for slot, place in places.items() if slot not in plain}
        tokens, arrived = _read_back(computed.tokens) if plain else (computed.tokens, _nothing)
        for slot in plain:
            self._slots.num_outputs[slot] += 1  # the next step counts on it

        @torch.inference_mode()
        def draw() -> None:
            if self._end_last is draw:
                self._end_last = _nothing
                logits = computed.logits[torch.tensor(list(others.values()), device=self.forward.device)].cpu()
                begin = perf_counter()
                self._sampler.draw(logits, list(others), result)
                chosen = [new[-1] for new in result.token_ids]
                self.forward.set_last_tokens(list(others), chosen)
                result.sample_s = perf_counter() - begin

        if others:
            self._end_last = draw

        def read() -> StepOutput:
            draw()
            arrived()
            begin = perf_counter()
            self._take(plain, tokens, result)
            result.sample_s += perf_counter() - begin
            return result

        return read

    def _take(self, places: dict[int, int], tokens: Tensor, result: StepOutput) -> None:
        """Put what the device chose, as BatchOutput has it, into the result."""
        rows: list[list[int]] = tokens[list(places.values())].tolist() if places else []
        verifying = self._verifying.pop(result.step_id)
        wrong = [at for at, row in enumerate(rows) if row[0] == -1]
        if wrong:
            raise NonFiniteLogits(wrong)
        for slot, (last, *rest) in zip(places, rows, strict=True):
            num_accepted, num_wrong, *drafts = rest or (0, 0)
            result.slots.append(slot)
            result.token_ids.append([*drafts[:num_accepted], last])
            result.num_nonfinite_drafts += num_wrong
            if slot in verifying:
                self._slots.num_computed[slot] += num_accepted
                self._slots.num_outputs[slot] += num_accepted

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
