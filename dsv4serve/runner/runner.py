"""SchedulerOutput in, sampled tokens out."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from dsv4_kernels.metadata import StepMetadata
from dsv4serve.constrained.vocabulary import Vocabulary, no_vocabulary
from dsv4serve.memory import CachePools, CapacityPlan
from dsv4serve.model.context import Observer
from dsv4serve.model.transformer import Transformer
from dsv4serve.runner import logprobs
from dsv4serve.runner.constraints import Constraints
from dsv4serve.runner.drafts import Drafts
from dsv4serve.runner.paged import PagedStep
from dsv4serve.runner.sampler import Sampler, row_bytes
from dsv4serve.runner.sentinel import Sentinel
from dsv4serve.runner.shadow import ShadowCheck
from dsv4serve.runner.slots import SlotTable
from dsv4serve.speculative import Advance, MtpChain
from dsv4serve.types import (
    PAGE_TOKENS,
    Chunk,
    Constraint,
    PageAppend,
    SamplingParams,
    SchedulerOutput,
    StepOutput,
    Verify,
)


class Runner:
    """Runs one step at a time over its own cache.

    Args:
        transformer: the network with its weights.
        plan: how many slots, pages and tails to allocate; allocated here.
        observer: called with named intermediate values of every step, in row order. A Sentinel's findings are in the
            StepOutput.
        read_vocabulary: what the ids mean, needed by requests with a constraint.
        shadow_steps: every so many steps one is compared with the reference kernels; 0 = none.
    """

    steps_ahead = 0

    def __init__(
        self,
        transformer: Transformer,
        plan: CapacityPlan,
        observer: Observer | None = None,
        read_vocabulary: Callable[[], Vocabulary] = no_vocabulary,
        shadow_steps: int = 0,
    ) -> None:
        self.transformer = transformer
        self._observer = observer
        self.pools = CachePools(plan.layout, plan.num_slots, plan.num_pages, plan.num_tails, transformer.device)
        self.num_slots, self.num_pages, self.num_tails = plan.num_slots, plan.num_pages, plan.num_tails
        self.max_model_len = plan.max_model_len
        self.vocab_size = transformer.config.vocab_size
        self.eos_token_id = transformer.config.eos_token_id
        max_pages = -(-plan.max_model_len // PAGE_TOKENS)
        self._constraints = Constraints(read_vocabulary)
        self._slots = SlotTable(plan.num_slots, max_pages, self.eos_token_id)
        self._sampler = Sampler(self._slots, self._constraints)
        self._no_pages = np.empty((0, 0), dtype=np.int64)
        self._shadow = ShadowCheck(transformer, self.pools, shadow_steps) if shadow_steps else None
        self._chain = self._make_chain() if plan.layout.num_draft_tokens else None

    def _make_chain(self) -> MtpChain | None:
        return MtpChain(self.transformer, self.pools, self._mtp_step)

    def may_draft(self, params: SamplingParams) -> bool:
        """Whether drafts may be made for a request with these parameters."""
        return params.may_speculate

    @torch.inference_mode()
    def submit(self, output: SchedulerOutput) -> Callable[[], StepOutput]:
        """Begin a step; what it returns gives its result (engine.runner_protocol).

        Both raise NonFiniteLogits when a row that samples has NaN or infinite logits.
        """
        begin = perf_counter()
        slots = self._slots
        for start in output.starts:
            slots.start(start)
            self._constraints.start(start)
            if start.tail >= 0:
                self.pools.restore(start.tail, start.slot)
            else:
                self.pools.init_slot(start.slot)
        for append in output.page_appends:
            self._append(append)
        take_result = self._begin(output, begin)
        for snapshot in output.snapshots:
            self.pools.snapshot(snapshot.slot, snapshot.tail)
        return take_result

    def execute(self, output: SchedulerOutput) -> StepOutput:
        """Run one step to its end."""
        return self.submit(output)()

    def _begin(self, output: SchedulerOutput, begin: float) -> Callable[[], StepOutput]:
        """The forward of a step, here to its end."""
        result = self._forward(output, begin) if output.num_tokens else StepOutput(step_id=output.step_id)
        if isinstance(self._observer, Sentinel):
            result.first_nonfinite, self._observer.first = self._observer.first, ""
        return lambda: result

    def _append(self, append: PageAppend) -> None:
        self._slots.append(append)

    def _logits(self, streams: Tensor) -> Tensor:
        return self.transformer.logits(streams)

    def prepare(self, constraint: Constraint) -> Future[None]:
        """Compile a request's constraint beside the steps; see Constraints.prepare."""
        return self._constraints.prepare(constraint)

    def shutdown(self) -> None:
        """End the compiling thread."""
        self._constraints.close()

    def _forward(self, output: SchedulerOutput, begin: float) -> StepOutput:
        slots, chunks, decodes = self._slots, output.chunks, output.decodes
        batch_slots = [chunk.slot for chunk in chunks] + decodes
        counts = [len(chunk.token_ids) for chunk in chunks] + [1] * len(decodes)
        ids = [token for chunk in chunks for token in chunk.token_ids] + [slots.last_token[slot] for slot in decodes]
        num_plain, drafts, num_drafts = len(batch_slots), None, []
        to_draft = perf_counter()
        if output.verifies:
            drafts = self._draft(output.verifies)
            num_drafts = [0] * num_plain + drafts.counts
            batch_slots += drafts.batch
            counts += [1 + count for count in drafts.counts]
        drafted = perf_counter()
        starts = [slots.num_computed[slot] for slot in batch_slots]
        metadata = StepMetadata(
            slots=batch_slots,
            starts=starts,
            counts=counts,
            page_table=slots.page_table(batch_slots),
            page_tokens=PAGE_TOKENS,
            c4_ring_rows=self.pools.layout.c4_ring_rows,
            drafts=num_drafts,
            c128_banks=self.pools.layout.c128_banks,
        )
        token_ids = torch.tensor(ids, dtype=torch.int64)
        if drafts is not None:
            token_ids = torch.cat([token_ids, drafts.inputs()])
        prepared = perf_counter()
        expected = self._shadow.expect(token_ids, metadata) if self._shadow is not None else None
        streams = self.transformer(token_ids, PagedStep(self.pools, metadata, self._observer))
        result = StepOutput(step_id=output.step_id, prepare_s=prepared - drafted + to_draft - begin)
        if self._shadow is not None and expected is not None:
            self._shadow.compare(expected, streams, metadata, result)
        self._prompt_logprobs(streams, chunks, result)
        num_accepted = self._choose(streams, output, drafts, result)
        kept = counts[:num_plain] + [1 + num for num in num_accepted]  # positions that stay
        for slot, count in zip(batch_slots, kept, strict=True):
            slots.num_computed[slot] += count
        if drafts is not None:
            self.pools.commit(torch.tensor(drafts.batch), torch.tensor(num_accepted))
        if self._chain is not None:
            places = zip(batch_slots, starts, kept, metadata.first_rows, strict=True)
            advances = [Advance(*place, has_drafted=index >= num_plain) for index, place in enumerate(places)]
            self._chain.follow(advances, streams, token_ids)
        return result

    def _choose(self, streams: Tensor, output: SchedulerOutput, drafts: Drafts | None, result: StepOutput) -> list[int]:
        """Logits that were asked for and the new tokens go into `result`; returns how many drafts each verify keeps."""
        prompt_rows = self._prompt_rows(output.chunks)
        sampling_rows, sampling_slots = self._sampling_rows(output.chunks, output.decodes)
        rows = [row for rows in prompt_rows.values() for row in rows] + sampling_rows
        if drafts is not None:
            rows += range(len(streams) - drafts.num_rows, len(streams))
        if not rows:
            return []
        logits = self.transformer.logits(streams if rows == list(range(len(streams))) else streams[rows])
        taken = 0
        for slot, wanted in prompt_rows.items():
            result.prompt_logits[slot] = row_bytes(logits[taken : taken + len(wanted)])
            taken += len(wanted)
        computed = perf_counter()
        end = taken + len(sampling_slots)
        self._sampler.draw(logits[taken:end], sampling_slots, result)
        num_accepted = [] if drafts is None else self._sampler.verify(logits[end:], drafts, result)
        result.sample_s = perf_counter() - computed
        return num_accepted

    def _draft(self, verifies: list[Verify]) -> Drafts:
        """Make the drafts of a step."""
        assert self._chain is not None, "drafts need a cache with room for them"
        slots = self._slots
        batch, counts = [verify.slot for verify in verifies], [verify.num_draft_tokens for verify in verifies]
        drafts = self._sampler.start_drafts(batch, counts)
        self._chain.draft(
            batch,
            [slots.num_computed[slot] for slot in batch],
            [slots.last_token[slot] for slot in batch],
            counts,
            drafts.choose,
        )
        drafts.end()
        return drafts

    def _mtp_step(self, batch: list[int], starts: list[int], counts: list[int]) -> PagedStep:
        """A step of the MTP block, which reads no pages."""
        metadata = StepMetadata(batch, starts, counts, self._no_pages, PAGE_TOKENS, self.pools.layout.c4_ring_rows)
        return PagedStep(self.pools, metadata, self._observer)

    def _sampling_rows(self, chunks: list[Chunk], decodes: list[int]) -> tuple[list[int], list[int]]:
        """Step rows whose logits choose a token, and their slots."""
        rows, slots = [], []
        end = 0
        for chunk in chunks:
            end += len(chunk.token_ids)
            if chunk.samples:
                rows.append(end - 1)
                slots.append(chunk.slot)
        return rows + list(range(end, end + len(decodes))), slots + decodes

    def _prompt_rows(self, chunks: list[Chunk]) -> dict[int, list[int]]:
        """Step rows of prompt tokens whose logits were asked for, by slot."""
        wanted: dict[int, list[int]] = {}
        end = 0
        for chunk in chunks:
            first, end = end, end + len(chunk.token_ids)
            num_rows = self._slots.params(chunk.slot).num_prompt_logits
            if num_rows:
                start, num_prompt = self._slots.num_computed[chunk.slot], self._slots.num_prompt[chunk.slot]
                rows = range(max(start, num_prompt - num_rows), min(start + len(chunk.token_ids), num_prompt))
                if rows:
                    wanted[chunk.slot] = [first + position - start for position in rows]
        return wanted

    def _prompt_logprobs(self, streams: Tensor, chunks: list[Chunk], result: StepOutput) -> None:
        """Log probabilities of the prompt tokens that follow the rows of `chunks`, where they were asked for."""
        end = 0
        for chunk in chunks:
            first, end = end, end + len(chunk.token_ids)
            next_ids = self._slots.following_prompt_ids(chunk.slot, end - first)
            if next_ids:
                num_top = self._slots.params(chunk.slot).num_prompt_logprobs or 0
                result.prompt_logprobs[chunk.slot] = logprobs.of_prompt(
                    self._logits, streams[first : first + len(next_ids)], next_ids, num_top
                )
