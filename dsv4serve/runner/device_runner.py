"""The runner on a GPU. Slots, tails, requests and answers are those of `Runner`; the forward is the device's.

A step of decodes replays a graph and samples on the device; the host reads back one token per request. A request that
wants more of its logits than a token (penalties, bias, bans, a grammar, log probabilities) sends its step's logits to
the host, where `Sampler` does what it does on CPU. Steps do not overlap yet: the host waits for each.
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
from dsv4serve.runner.device_batch import LAST_TOKEN, BatchOutput, DeviceForward, bucket_of, fill_inputs, host_inputs
from dsv4serve.runner.graphs import DecodeSteps
from dsv4serve.runner.runner import Runner
from dsv4serve.runner.sampler import row_bytes
from dsv4serve.types import PAGE_TOKENS, PageAppend, SchedulerOutput, StepOutput


class DeviceRunner(Runner):
    """Runs one step at a time over a cache on the device of `transformer`.

    Args:
        plan: a layout of official formats without drafts.
    """

    def __init__(
        self,
        transformer: DeviceTransformer,
        plan: CapacityPlan,
        read_vocabulary: Callable[[], Vocabulary] = no_vocabulary,
    ) -> None:
        assert not plan.layout.num_draft_tokens, "the device engine has no drafts"
        super().__init__(transformer, plan, read_vocabulary=read_vocabulary)
        max_pages = -(-plan.max_model_len // PAGE_TOKENS)
        self.forward = DeviceForward(transformer, self.pools, max_pages)
        self.decode_steps = DecodeSteps(self.forward, plan.num_slots)
        self._max_pages = max_pages
        self._new_pages: dict[int, int] = {}  # by place in the page table, to be written before the next forward

    def _append(self, append: PageAppend) -> None:
        first = append.slot * self._max_pages + self._slots.append(append)
        self._new_pages |= enumerate(append.pages, start=first)

    def _logits(self, streams: Streams) -> Tensor:
        """Float32 logits on the host."""
        return self.transformer.logits(streams).cpu()

    def _forward(self, output: SchedulerOutput, begin: float) -> StepOutput:
        slots, chunks = self._slots, output.chunks
        batch = [chunk.slot for chunk in chunks] + output.decodes
        counts = [len(chunk.token_ids) for chunk in chunks] + [1] * len(output.decodes)
        columns = self._columns(batch, counts)
        if self._new_pages:
            self.forward.append_pages(list(self._new_pages), list(self._new_pages.values()))
            self._new_pages = {}
        result = StepOutput(step_id=output.step_id, prepare_s=perf_counter() - begin)
        if chunks:
            ids = [token for chunk in chunks for token in chunk.token_ids] + [LAST_TOKEN] * len(output.decodes)
            computed = self._mixed(columns, ids)
        else:
            bucket = bucket_of(len(batch))
            fill_inputs(self.decode_steps.host[bucket], columns)
            computed = self.decode_steps.run(bucket)
        self._prompt_logprobs(computed.rows, chunks, result)
        for slot, rows in self._prompt_rows(chunks).items():
            index = torch.tensor(rows, device=self.forward.device)
            result.prompt_logits[slot] = row_bytes(self._logits(computed.rows[index]))
        samples = [chunk.samples for chunk in chunks] + [True] * len(output.decodes)
        self._sample(computed, [place for place, wanted in enumerate(samples) if wanted], batch, result)
        for slot, count in zip(batch, counts, strict=True):
            slots.num_computed[slot] += count
        return result

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

    def _mixed(self, columns: dict[str, list[int] | list[float]], ids: list[int]) -> BatchOutput:
        """A step with prefill, eagerly, padded to buckets of rows and requests."""
        inputs = host_inputs(bucket_of(self.num_slots), pinned=False)
        fill_inputs(inputs, columns)
        # More rows than requests, so that the two are never taken for one another.
        num_rows = bucket_of(max(len(ids), inputs.shape[1] + 1))
        token_ids = torch.zeros(num_rows, dtype=torch.int64)
        token_ids[: len(ids)] = torch.tensor(ids)
        device = self.forward.device
        return self.forward(inputs.to(device), token_ids.to(device))

    def _sample(self, computed: BatchOutput, places: list[int], batch: list[int], result: StepOutput) -> None:
        """Take the tokens of the requests at `places` of the batch."""
        if not places:
            return
        sampling = [batch[place] for place in places]
        if all(map(self._is_plain, sampling)):
            tokens = computed.tokens.tolist()  # waits for the device
            begin = perf_counter()
            chosen = [tokens[place] for place in places]
            if -1 in chosen:
                raise NonFiniteLogits([row for row, token in enumerate(chosen) if token == -1])
            for slot, token in zip(sampling, chosen, strict=True):
                self._sampler.take(slot, [token], result)
        else:
            logits = computed.logits[torch.tensor(places, device=self.forward.device)].cpu()
            begin = perf_counter()
            self._sampler.draw(logits, sampling, result)
            self.forward.set_last_tokens(result.slots, [tokens[-1] for tokens in result.token_ids])
        result.sample_s = perf_counter() - begin

    def _is_plain(self, slot: int) -> bool:
        """The request wants nothing but a token."""
        params = self._slots.params(slot)
        wants_logits = params.return_logits or params.num_logprobs is not None or params.constraint is not None
        return self._slots.adjustments[slot] is None and not wants_logits
