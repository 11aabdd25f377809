"""A deterministic language model in slots, pages and tails, driven by SchedulerOutput alone.

Every page remembers the tokens written to it and a checksum of what came before, every slot and tail the tokens its
state has consumed. Each read is checked against the history of the request, and the next token is a hash of the history
read back from the pages: an error in the bookkeeping either fails here or changes tokens. Drafts are right as often as
a hash says.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

from dsv4serve.types import PAGE_TOKENS, Request, SamplingParams, SchedulerOutput, StepOutput

VOCAB_SIZE = 50
EOS = 0


def checksum(tokens: list[int], start: int = 0) -> int:
    return crc32(array("q", tokens).tobytes(), start)


def next_token(history: list[int], seed: int) -> int:
    """The language model."""
    return checksum(history, seed & 0xFFFFFFFF) % VOCAB_SIZE


def generate_alone(request: Request, max_model_len: int) -> list[int]:
    """What `request` must produce whatever else runs: the definition, without scheduler or cache."""
    sampling, history, outputs = request.sampling, list(request.prompt_ids), []
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    while len(outputs) < sampling.max_tokens and len(history) < max_model_len:
        outputs.append(next_token(history, sampling.seed))
        history.append(outputs[-1])
        if outputs[-1] in stops and len(outputs) >= sampling.min_tokens:
            break
    return outputs


@dataclass
class Page:
    tokens: list[int] = field(default_factory=list)
    before: int = 0  # checksum of the history in front of the page


@dataclass
class Slot:
    sampling: SamplingParams
    num_prompt: int
    table: list[int]
    consumed: list[int]  # what window and compressor states have seen
    last_token: int | None = None
    num_outputs: int = 0


class FakeRunner:
    """`owners` (page -> reference count) lets it check that nothing shared is written."""

    def __init__(self, num_slots: int, num_pages: int, num_tails: int, owners: Callable[[int], int] | None) -> None:
        self.slots: list[Slot | None] = [None] * num_slots
        self.pages = [Page() for _ in range(num_pages)]
        self.tails: list[list[int] | None] = [None] * num_tails
        self._owners = owners
        self.accepts: int | None = None  # drafts of each verify that are right; None = as a hash says

    def execute(self, step: SchedulerOutput) -> StepOutput:
        self._start(step)
        chunks = {chunk.slot: chunk for chunk in step.chunks}
        ran = [*chunks, *step.decodes, *(verify.slot for verify in step.verifies)]
        assert len(ran) == len(set(ran)), "a slot runs once in a step"
        result = StepOutput(step_id=step.step_id)
        for number, chunk in chunks.items():
            slot = self._slot(number)
            first = len(slot.consumed)
            self._consume(slot, chunk.token_ids)
            assert chunk.samples or len(slot.consumed) % PAGE_TOKENS == 0, "unfinished chunks end at page boundaries"
            end, wanted = len(slot.consumed), slot.sampling.num_prompt_logits
            rows = range(max(first, slot.num_prompt - wanted), min(end, slot.num_prompt))
            if wanted and rows:
                result.prompt_logits[number] = [b"row %d" % row for row in rows]
            if chunk.samples:
                self._sample(number, result)
        for number in step.decodes:
            slot = self._slot(number)
            assert slot.last_token is not None, "decode before a token was sampled"
            self._consume(slot, [slot.last_token])
            self._sample(number, result)
        for verify in step.verifies:
            self._verify(verify.slot, verify.num_draft_tokens, result)
        assert len({snapshot.tail for snapshot in step.snapshots}) == len(step.snapshots), "one tail written twice"
        for snapshot in step.snapshots:
            slot = self._slot(snapshot.slot)
            assert slot.consumed, "a tail of nothing"
            assert len(slot.consumed) % PAGE_TOKENS == 0, "tails are taken at page boundaries"
            self.tails[snapshot.tail] = list(slot.consumed)
        return result

    def _start(self, step: SchedulerOutput) -> None:
        for start in step.starts:
            consumed: list[int] = []
            if start.tail >= 0:
                restored = self.tails[start.tail]
                assert restored is not None, "restored from a tail that was never taken"
                consumed = list(restored)
            assert len(consumed) == start.num_computed_tokens, "the tail stands elsewhere"
            self.slots[start.slot] = Slot(
                sampling=start.sampling,
                num_prompt=start.num_prompt_tokens,
                table=[],
                consumed=consumed,
                num_outputs=start.num_output_tokens,
            )
        for append in step.page_appends:
            self._slot(append.slot).table += append.pages
            assert len(set(self._slot(append.slot).table)) == len(self._slot(append.slot).table)

    def _slot(self, number: int) -> Slot:
        slot = self.slots[number]
        assert slot is not None, "the slot was never started"
        return slot

    def _consume(self, slot: Slot, token_ids: list[int]) -> None:
        """Check all that attention reads, then write the new rows."""
        assert token_ids
        history = self._read(slot)
        assert history == slot.consumed, "pages and slot state disagree about the history"
        for token in token_ids:
            index, offset = divmod(len(slot.consumed), PAGE_TOKENS)
            assert index < len(slot.table), "no page for this position"
            number = slot.table[index]
            page = self.pages[number]
            if self._owners is not None:
                assert self._owners(number) == 1, "a shared page is written"
            if offset == 0:
                page.tokens, page.before = [], checksum(slot.consumed)
            assert len(page.tokens) >= offset, "a hole in the page"
            del page.tokens[offset:]  # what a result that came too late had written
            page.tokens.append(token)
            slot.consumed.append(token)

    def _read(self, slot: Slot) -> list[int]:
        history: list[int] = []
        for number in slot.table[: -(-len(slot.consumed) // PAGE_TOKENS)]:
            page = self.pages[number]
            assert page.before == checksum(history), "a page of another prompt"
            history += page.tokens
        return history[: len(slot.consumed)]

    def _verify(self, number: int, num_drafts: int, result: StepOutput) -> None:
        """Drafts of which a hash says how many are right; the wrong ones leave rubbish behind the history."""
        slot = self._slot(number)
        assert slot.last_token is not None, "verify before a token was sampled"
        assert slot.sampling.may_speculate
        first = len(slot.consumed)
        num_accepted = checksum(slot.consumed, 77) % (num_drafts + 1) if self.accepts is None else self.accepts
        tokens = []
        for _ in range(min(num_accepted, num_drafts) + 1):
            self._consume(slot, [slot.last_token])
            tokens.append(self._draw(slot))
        end = first + 1 + num_drafts
        assert first // PAGE_TOKENS == end // PAGE_TOKENS, "drafts reach the page boundary"
        page = self.pages[slot.table[first // PAGE_TOKENS]]
        page.tokens += [-1] * (end % PAGE_TOKENS - len(page.tokens))
        result.slots.append(number)
        result.token_ids.append(tokens)
        if slot.sampling.return_logits:
            result.logits[number] = [b"logits %d" % (first + 1 + index) for index in range(len(tokens))]

    def _sample(self, number: int, result: StepOutput) -> None:
        slot = self._slot(number)
        result.slots.append(number)
        result.token_ids.append([self._draw(slot)])
        if slot.sampling.return_logits:
            result.logits[number] = [b"logits %d" % len(slot.consumed)]

    def _draw(self, slot: Slot) -> int:
        history = self._read(slot)
        assert len(history) == slot.num_prompt + slot.num_outputs, "sampled before all known tokens were computed"
        slot.last_token = next_token(history, slot.sampling.seed)
        slot.num_outputs += 1
        return slot.last_token


def prompt(seed: int, length: int) -> list[int]:
    """Deterministic ids without EOS; different seeds differ from the first token on."""
    return [1 + (seed * 17 + index * index * 31 + index // 7) % (VOCAB_SIZE - 1) for index in range(length)]
