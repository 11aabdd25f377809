"""SchedulerOutput in, sampled tokens out."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from time import perf_counter

import torch
from torch import Tensor

from dsv4_kernels.metadata import StepMetadata
from dsv4_kernels.sampling import sample, uniform
from dsv4serve.constrained.vocabulary import Vocabulary, no_vocabulary
from dsv4serve.memory import CachePools, CapacityPlan
from dsv4serve.model.context import Observer
from dsv4serve.model.transformer import Transformer
from dsv4serve.runner import logprobs
from dsv4serve.runner.adjust import adjust
from dsv4serve.runner.constraints import Constraints
from dsv4serve.runner.paged import PagedStep
from dsv4serve.runner.slots import SlotTable
from dsv4serve.types import PAGE_TOKENS, Chunk, Constraint, SchedulerOutput, StepOutput


class Runner:
    """Runs one step at a time over its own cache.

    Args:
        transformer: the network with its weights.
        plan: how many slots, pages and tails to allocate; allocated here.
        observer: called with named intermediate values of every step, in row order.
        read_vocabulary: what the ids mean, needed by requests with a constraint.
    """

    def __init__(
        self,
        transformer: Transformer,
        plan: CapacityPlan,
        observer: Observer | None = None,
        read_vocabulary: Callable[[], Vocabulary] = no_vocabulary,
    ) -> None:
        self.transformer = transformer
        self._observer = observer
        self.pools = CachePools(plan.layout, plan.num_slots, plan.num_pages, plan.num_tails)
        self.num_slots, self.num_pages, self.num_tails = plan.num_slots, plan.num_pages, plan.num_tails
        self.max_model_len = plan.max_model_len
        self.vocab_size = transformer.config.vocab_size
        self.eos_token_id = transformer.config.eos_token_id
        max_pages = -(-plan.max_model_len // PAGE_TOKENS)
        self._constraints = Constraints(read_vocabulary)
        self._slots = SlotTable(plan.num_slots, max_pages, self.eos_token_id)

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> StepOutput:
        """Run one step. Raises NonFiniteLogits when a row that samples has NaN or infinite logits."""
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
            slots.append(append)
        result = self._forward(output, begin) if output.num_tokens else StepOutput(step_id=output.step_id)
        for snapshot in output.snapshots:
            self.pools.snapshot(snapshot.slot, snapshot.tail)
        return result

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
        metadata = StepMetadata(
            slots=batch_slots,
            starts=[slots.num_computed[slot] for slot in batch_slots],
            counts=counts,
            page_table=slots.page_table(batch_slots),
            page_tokens=PAGE_TOKENS,
            c4_ring_rows=self.pools.layout.c4_ring_rows,
        )
        prepared = perf_counter()
        streams = self.transformer(torch.tensor(ids), PagedStep(self.pools, metadata, self._observer))
        prompt_rows = self._prompt_rows(chunks)
        sampling_rows, sampling_slots = self._sampling_rows(chunks, decodes)
        result = StepOutput(step_id=output.step_id, prepare_s=prepared - begin)
        self._prompt_logprobs(streams, chunks, result)
        for slot, count in zip(batch_slots, counts, strict=True):
            slots.num_computed[slot] += count
        rows = [row for rows in prompt_rows.values() for row in rows] + sampling_rows
        if not rows:
            return result
        logits = self.transformer.logits(streams if rows == list(range(metadata.num_rows)) else streams[rows])
        num_prompt_rows = len(rows) - len(sampling_rows)
        taken = 0
        for slot, wanted in prompt_rows.items():
            result.prompt_logits[slot] = _row_bytes(logits[taken : taken + len(wanted)])
            taken += len(wanted)
        computed = perf_counter()
        self._sample(logits[num_prompt_rows:], sampling_slots, result)
        result.sample_s = perf_counter() - computed
        return result

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
                    self.transformer.logits, streams[first : first + len(next_ids)], next_ids, num_top
                )

    def _sample(self, logits: Tensor, batch: list[int], result: StepOutput) -> None:
        """Draw one token per row [len(batch), vocab]; the slots remember it as their next input."""
        if not batch:
            return
        slots = self._slots
        params = [slots.params(slot) for slot in batch]
        kept = [row for row, p in enumerate(params) if p.return_logits or p.num_logprobs is not None]
        raw = logits[kept] if kept else logits  # copies of rows that are asked for, as the model gave them
        adjust(logits, [slots.adjustments[slot] for slot in batch])
        self._constraints.apply(logits, batch)
        token_ids = sample(
            logits,
            temperature=torch.tensor([p.temperature for p in params]),
            top_k=torch.tensor([p.top_k for p in params]),
            top_p=torch.tensor([p.top_p for p in params]),
            min_p=torch.tensor([p.min_p for p in params]),
            uniform=torch.tensor(
                [uniform(p.seed, slots.num_outputs[slot]) for p, slot in zip(params, batch, strict=True)],
                dtype=torch.float64,
            ),
        ).tolist()
        for slot, token in zip(batch, token_ids, strict=True):
            slots.sampled(slot, token)
            if (wrong := self._constraints.accept(slot, token)) is not None:
                result.errors[slot] = wrong
            result.slots.append(slot)
            result.token_ids.append([token])
        for row, values in zip(kept, raw, strict=True) if kept else ():
            if params[row].return_logits:
                result.logits[batch[row]] = _row_bytes(values.unsqueeze(0))
            num_top = params[row].num_logprobs
            if num_top is not None:
                result.logprobs[batch[row]] = logprobs.describe(values.unsqueeze(0), [token_ids[row]], num_top)


def _row_bytes(logits: Tensor) -> list[bytes]:
    """float32 rows as bytes."""
    return [row.tobytes() for row in logits.float().numpy()]
