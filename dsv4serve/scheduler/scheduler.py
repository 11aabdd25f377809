"""Which tokens run in the next step.

There are no phases: every step gives each running request some new tokens, one for decode (more where drafts are
accepted) and a chunk for prefill, under a token budget. Decodes come first and are never starved, even when they
exceed the budget; prefill gets what they leave, at least one page. A step therefore has at most
max(max_step_tokens, num_slots + PAGE_TOKENS) rows.

Progress. Requests have a total order: priority aged by waiting time, then arrival. A request is accepted only if it
fits alone. When pages run out the cache gives back all that no request holds, and then the last running request in
order is retracted: so the first one always gets its next token or chunk, whatever the others do. A request that
cannot be admitted now blocks all behind it, so nothing overtakes it for ever. Together: every request becomes the
first of the open ones after finitely many others, and then it ends; retractions cannot go round in a circle.

Sharing. A request whose prefix a running one is about to compute waits for it, as for a slot; a running prefill ends
after finitely many steps, by its end or by a retraction, so the wait does too.

Tails. A tail costs as much memory as several pages, so prefill evicts others' tails for at most two of its own:
at the last page boundary of the known tokens (the next turn, or the same prompt again, continues there), and where the
prompt leaves what the tree already knows (a system prompt shared by different users gets its tail from the second
user on at the latest). One more where the tokens fill their last page, because the same prompt again has to compute one
of them. Prefill stops there for it. Other chunk ends get a tail only while some are free. Decode takes one at each page
boundary and overwrites its own previous one.

Drafts. A decode with drafts advances by a number of tokens that nobody knows before its result is there. The next step
is planned for any number, and the runner begins it behind those that were accepted. Drafts take what the budget leaves
after one row for each decode, and end before the page boundary: that is always reached by a decode without drafts, so
growth, tails and retraction happen at times that are known when the step is planned. A request that may be that far, or
at its last token, is left out of the step until its result is there.

Order of effects. A step restores tails before its forward and snapshots them after it, and steps run in the order in
which they were planned. So a page or tail may be freed and given away while a planned step still uses it. What a
step computes enters the tree in `update`, after it has run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dsv4serve.cache import PagePool, Pool, PrefixTree
from dsv4serve.scheduler.drafts import DraftPolicy
from dsv4serve.scheduler.queue import WaitingQueue
from dsv4serve.scheduler.state import RequestState, pages_of
from dsv4serve.scheduler.stats import SchedulerStats
from dsv4serve.types import (
    PAGE_TOKENS,
    Chunk,
    FinishReason,
    InvalidRequest,
    PageAppend,
    QueueFull,
    Request,
    RequestOutput,
    SchedulerOutput,
    SlotStart,
    StepOutput,
    TailSnapshot,
)

# Admission leaves pages for this many steps of the running requests' growth, or it would be undone at once.
GROWTH_STEPS = 16


class Scheduler:
    """Plans steps and digests their results. Owns the bookkeeping of slots, pages, tails and the prefix tree.

    `schedule` may be called again before the `update` of the step before: it counts what is planned, and no
    decision in it looks at a token that is not known yet. The results of a request that ended or was retracted
    meanwhile are ignored.

    Args:
        num_slots, num_pages, num_tails: what the runner allocated.
        max_model_len: tokens, prompt and output of one request.
        max_step_tokens: rows of one step, at least PAGE_TOKENS.
        prefix_cache: reuse the pages of earlier requests (needs tails).
        max_waiting: requests that may wait beyond those that free slots can take; more raise QueueFull.
        ageing_s: seconds of waiting that weigh as much as one priority level.
        drafts: how many drafts a step verifies; None = the runner makes none.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        num_slots: int,
        num_pages: int,
        num_tails: int,
        max_model_len: int,
        max_step_tokens: int,
        eos_token_id: int,
        prefix_cache: bool = True,
        max_waiting: int = 1024,
        ageing_s: float = 10.0,
        drafts: DraftPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots, self._pages, self._tails = Pool("slot", num_slots), PagePool(num_pages), Pool("tail", num_tails)
        self._tree = PrefixTree(self._pages, self._tails)
        self._max_model_len, self._max_step_tokens = max_model_len, max_step_tokens
        self._eos_token_id, self._prefix_cache = eos_token_id, prefix_cache and num_tails > 0
        self._max_waiting, self._ageing_s, self._clock = max_waiting, ageing_s, clock
        self._requests: dict[str, RequestState] = {}
        self._waiting = WaitingQueue()
        self._drafts = drafts
        # By slot: all that run; of these, who prefills and who decodes (neither: the last token in flight).
        self._running: dict[int, RequestState] = {}
        self._prefilling: dict[int, RequestState] = {}
        self._decoding: dict[int, RequestState] = {}
        self._promised: dict[int, list[tuple[RequestState, int, int]]] = {}  # step -> (request, tokens, tail) to insert
        self._num_added = 0
        most = drafts.most if drafts is not None else 0
        self._counters = SchedulerStats(num_drafted=[0] * most, num_accepted=[0] * most)

    # Requests in and out

    def add(self, request: Request) -> None:
        """Queue a request; max_tokens is clipped so that prompt and output fit max_model_len.

        Raises:
            InvalidRequest: it can never be served; the message names the lengths.
            QueueFull: max_waiting requests wait already.
        """
        num_prompt, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
        if request.request_id in self._requests:
            raise InvalidRequest(f"request id {request.request_id!r} is already in use", "request_id")
        if num_prompt == 0:
            raise InvalidRequest("the prompt is empty; at least one token is needed", "prompt")
        if num_prompt >= self._max_model_len:
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens; the context holds {self._max_model_len}, "
                f"so a prompt may have at most {self._max_model_len - 1}",
                "prompt",
            )
        if max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {max_tokens}; at least 1 is needed", "max_tokens")
        max_length = min(num_prompt + max_tokens, self._max_model_len)
        if pages_of(max_length) > self._pages.size:
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens, with max_tokens {max_length}; "
                f"the cache holds {self._pages.size * PAGE_TOKENS}",
                "max_tokens",
            )
        if len(self._waiting) >= self._max_waiting + self._slots.num_free:
            raise QueueFull(f"{len(self._waiting)} requests are waiting already; try again later")
        # All waiting requests age alike, so their order is fixed at arrival: priority minus levels waited differs
        # from this sum by the same amount for all.
        now = self._clock()
        order = (request.priority + now / self._ageing_s, self._num_added)
        self._num_added += 1
        may_draft = self._drafts is not None and self._drafts.may_draft(request.sampling)
        state = RequestState(request, order, max_length, self._eos_token_id, may_draft)
        state.added_at = now
        self._requests[request.request_id] = state
        self._waiting.push(state)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now, wherever it is. None when it is unknown or has ended."""
        state = self._requests.get(request_id)
        if state is None:
            return None
        self._end(state)
        return RequestOutput(request_id=request_id, finish_reason=FinishReason.ABORT)

    def flush_prefix_cache(self) -> int:
        """Forget all prefixes, and return how many pages that freed. Requests keep what they use."""
        num_free = self._pages.num_free
        self._tree.clear()
        return self._pages.num_free - num_free

    @property
    def has_requests(self) -> bool:
        """True while anything waits or runs."""
        return bool(self._requests)

    def stats(self) -> SchedulerStats:
        """Counters so far and gauges of now."""
        counters = self._counters
        counters.num_waiting, counters.num_running = len(self._waiting), len(self._running)
        counters.num_free_slots = self._slots.num_free
        counters.num_free_pages = self._pages.num_free + self._pages.num_evictable
        counters.num_free_tails = self._tails.num_free + self._tree.num_tails
        counters.num_cached_pages, counters.num_cached_tails = self._pages.num_evictable, self._tree.num_tails
        counters.num_retracted = self._waiting.num_retracted
        counters.num_evicted_pages = self._tree.num_evicted_pages
        counters.num_evicted_tails = self._tree.num_evicted_tails
        return counters

    # Planning

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None when there is nothing to run."""
        step = SchedulerOutput(step_id=self._counters.num_steps)
        retractions = self._counters.num_retractions
        apart = self._take_apart() if self._drafts is not None else {}
        self._plan_decodes(step)
        for state, num_drafts in apart.items():
            if state.slot >= 0:  # not retracted
                self._decoding[state.slot] = state
                if num_drafts:
                    step.verifies.append(state.verify(num_drafts))
        budget = max(self._max_step_tokens - step.num_tokens, PAGE_TOKENS)
        for state in list(self._prefilling.values()):
            budget -= self._plan_chunk(state, budget, step)
        # Whoever just gave back its pages would take them again at once; wait for a step without shortage.
        if self._counters.num_retractions == retractions:
            self._admit(budget, step)
        if not step.num_tokens:
            return None
        self._counters.num_steps += 1
        return step

    def _take_apart(self) -> dict[RequestState, int]:
        """Take out of the decoding requests those that get drafts now, how many, and those that must wait: 0."""
        assert self._drafts is not None
        apart = {state: 0 for state in self._decoding.values() if state.must_wait}
        num_decoding = len(self._decoding) - len(apart)
        room = self._max_step_tokens - num_decoding
        if self._prefilling or len(self._waiting):
            room -= PAGE_TOKENS
        most = min(self._drafts.choose(num_decoding), room // num_decoding) if num_decoding else 0
        for state in self._decoding.values() if most > 0 else ():
            num = min(most, state.draft_room) if state.may_draft else 0
            if num > 0 and state not in apart:
                apart[state] = num
        for state in apart:
            del self._decoding[state.slot]
        return apart

    def _plan_decodes(self, step: SchedulerOutput) -> None:
        """One token for every decoding request; pages for the next one and tails where a page gets full."""
        reached = []
        for state in self._decoding.values():
            state.num_computed += 1
            if state.num_computed == state.event:
                reached.append(state)
        # In order, so that a retraction never hits a request that was served before in this loop.
        reached.sort(key=lambda state: state.order)
        for state in reached:
            if state.slot >= 0 and state.num_computed < state.last_computed:
                self._grow(state, step)
        step.decodes = list(self._decoding)
        for state in reached:
            if state.slot < 0:
                continue  # retracted
            if state.num_computed % PAGE_TOKENS == 0:
                self._plan_tail(state, step)
            if state.num_computed == state.last_computed:
                del self._decoding[state.slot]
            state.event = state.next_event()

    def _grow(self, state: RequestState, step: SchedulerOutput) -> None:
        """A page for the token after this one. When none is left the last in order is retracted, be it `state`."""
        while not self._pages.num_free and not self._tree.evict_page():
            victim = max(self._running.values(), key=lambda other: other.order)
            self._counters.num_retractions += 1
            self._release(victim)
            victim.was_retracted = True
            self._waiting.push(victim)
            if victim is state:
                return
        page = self._pages.allocate()
        state.pages.append(page)
        step.page_appends.append(PageAppend(state.slot, [page]))

    def _plan_tail(self, state: RequestState, step: SchedulerOutput) -> None:
        """Snapshot a decoding request after this step, over its previous pending tail if it has one."""
        if state.pending_tail < 0:
            state.pending_tail = self._take_tail()
        if state.pending_tail >= 0:
            state.tail_tokens = state.num_computed
            step.snapshots.append(TailSnapshot(state.slot, state.pending_tail))

    def _take_tail(self) -> int:
        """A tail for a snapshot, the least recently used one of the tree if need be; -1 when all are pending."""
        if not self._prefix_cache or not (self._tails.num_free or self._tree.evict_tail()):
            return -1
        return self._tails.allocate()

    def _plan_chunk(self, state: RequestState, budget: int, step: SchedulerOutput) -> int:
        """Give a prefilling request its next chunk; returns the rows used (0 when the budget holds no whole page)."""
        start, known = state.num_computed, state.num_known
        end = min(known, start + budget)
        tail = -1
        if state.stops and state.stops[0] <= end:
            end = state.stops.pop(0)
            tail = self._take_tail()
        elif end < known:
            end -= end % PAGE_TOKENS
            if end > start and self._tails.num_free:
                tail = self._take_tail()
        if end <= start:
            return 0
        if tail >= 0:
            step.snapshots.append(TailSnapshot(state.slot, tail))
            self._promised.setdefault(step.step_id, []).append((state, end, tail))
        step.chunks.append(Chunk(slot=state.slot, token_ids=state.tokens[start:end], samples=end == known))
        state.num_computed = end
        self._counters.num_prompt_tokens += end - start
        if end == known:
            del self._prefilling[state.slot]
            if end < state.last_computed:
                self._decoding[state.slot] = state
                state.event = state.next_event()
        return end - start

    def _admit(self, budget: int, step: SchedulerOutput) -> None:
        """Start waiting requests in order while slots, pages and budget last."""
        while (state := self._waiting.head) is not None and self._slots.num_free:
            if budget < min(PAGE_TOKENS, len(state.tokens)) or not self._start(state, step):
                return
            self._waiting.remove(state)
            budget -= self._plan_chunk(state, budget, step)

    def _start(self, state: RequestState, step: SchedulerOutput) -> bool:
        """Take a slot and all pages of the known tokens, reusing the longest cached prefix. False = not now."""
        num_known = len(state.tokens)
        keys = state.page_keys() if self._prefix_cache else []
        # At least one token must be computed; its logits choose the next one.
        usable = [] if state.wants_prompt_rows else keys[: (num_known - 1) // PAGE_TOKENS]
        match = self._tree.match(usable)
        if self._is_being_computed(usable, len(match.pages)):
            return False
        for page in match.pages:
            self._pages.retain(page)
        num_new = state.num_pages_to_start - len(match.pages)
        headroom = len(self._running) * GROWTH_STEPS // PAGE_TOKENS
        if num_new + headroom > self._pages.num_free + self._pages.num_evictable:
            for page in match.pages:
                self._pages.release(page)
            return False
        if match.pages:
            self._tree.use(keys[: len(match.pages)])
        while self._pages.num_free < num_new:
            self._tree.evict_page()
        state.pages = match.pages + [self._pages.allocate() for _ in range(num_new)]
        state.slot, state.first_step = self._slots.allocate(), step.step_id
        num_cached = state.num_computed = len(match.pages) * PAGE_TOKENS
        state.num_known = num_known
        if self._prefix_cache:
            ends = {num_known // PAGE_TOKENS, (num_known - 1) // PAGE_TOKENS}  # for the next turn, for the same prompt
            boundaries = {num_pages * PAGE_TOKENS for num_pages in ends | {match.num_known_pages}}
            state.stops = sorted(boundary for boundary in boundaries if boundary > num_cached)
        if state.num_cached is None and not state.num_outputs:
            state.num_cached = num_cached
        self._counters.num_cached_tokens += num_cached
        self._counters.num_prefix_hits += num_cached > 0
        state.was_retracted = False
        if state.started_at is None:
            state.started_at = self._clock()
        self._running[state.slot] = self._prefilling[state.slot] = state
        step.starts.append(
            SlotStart(
                slot=state.slot,
                request_id=state.request_id,
                sampling=state.sampling,
                num_computed_tokens=num_cached,
                tail=match.tail,
                num_prompt_tokens=state.num_prompt,
                num_output_tokens=state.num_outputs,
                token_ids=list(state.tokens) if state.sampling.needs_history else [],
            )
        )
        step.page_appends.append(PageAppend(state.slot, list(state.pages)))
        return True

    def _is_being_computed(self, keys: list[bytes], num_cached: int) -> bool:
        """Whether a prefill that runs will leave a tail behind more of `keys` than the `num_cached` pages in the tree.

        Then it pays to wait for it: choices 2 to n of one prompt arrive with the first, before it computed anything.
        """
        tails = [(state, tokens) for planned in self._promised.values() for state, tokens, _ in planned]
        tails += [(state, stop) for state in self._prefilling.values() for stop in state.stops]
        return any(
            num_cached < tokens // PAGE_TOKENS <= len(keys)
            and state.slot >= 0
            and state.keys[: tokens // PAGE_TOKENS] == keys[: tokens // PAGE_TOKENS]
            for state, tokens in tails
        )

    # Results

    def update(self, planned: SchedulerOutput, result: StepOutput) -> list[RequestOutput]:
        """Digest what `planned` produced: append tokens, end requests, keep tails. One output per new token."""
        step_id, running, logits, logprobs = planned.step_id, self._running, result.logits, result.logprobs
        num_expected = len(planned.decodes) + len(planned.verifies) + sum(chunk.samples for chunk in planned.chunks)
        if result.step_id != step_id or len(result.slots) != num_expected:
            raise RuntimeError(
                f"step {step_id} samples {num_expected} tokens; "
                f"the runner returned {len(result.slots)} of step {result.step_id}"
            )
        for state, num_tokens, tail in self._promised.pop(step_id, ()):
            self._insert_promised(state, num_tokens, tail, step_id)
        for slot, rows in result.prompt_logits.items():
            owner = running.get(slot)
            if owner is not None and owner.first_step <= step_id and not owner.num_outputs:
                owner.prompt_logits += rows
        for slot, entries in result.prompt_logprobs.items():
            owner = running.get(slot)
            if owner is not None and owner.first_step <= step_id and not owner.num_outputs:
                owner.prompt_logprobs += entries
        verifies = planned.verifies
        if verifies:
            self._end_verifies(planned, result)
        outputs, num_tokens = [], 0  # tokens beside the one of each output
        for slot, token_ids in zip(result.slots, result.token_ids, strict=True):
            owner = running.get(slot)
            if owner is None or owner.first_step > step_id:
                continue  # ended or retracted since the step was planned
            tokens = owner.tokens
            if verifies and len(token_ids) > 1:
                token_ids = owner.until_stop(token_ids)
                tokens += token_ids[:-1]
                num_tokens += len(token_ids) - 1
            token = token_ids[-1]
            tokens.append(token)
            output = RequestOutput(request_id=owner.request_id, token_ids=token_ids)
            outputs.append(output)
            if logits:
                output.logits = logits.get(slot, [])[: len(token_ids)]
            if logprobs:
                output.logprobs = logprobs.get(slot, [])[: len(token_ids)]
            if owner.num_cached is not None:
                output.num_cached_tokens, output.prompt_logits = owner.num_cached, owner.prompt_logits
                output.prompt_logprobs = owner.prompt_logprobs
                owner.num_cached, owner.prompt_logits, owner.prompt_logprobs = None, [], []
                if owner.started_at is not None:
                    output.queue_s = owner.started_at - owner.added_at
                    output.prefill_s = self._clock() - owner.started_at
            if slot in result.errors:
                output.finish_reason, output.error = FinishReason.ERROR, result.errors[slot]
                output.error_status = InvalidRequest.status
                self._end(owner)
            elif token in owner.stop_ids and len(tokens) >= owner.min_length:
                output.finish_reason, output.stop_token_id = FinishReason.STOP, token
                self._end(owner)
            elif len(tokens) == owner.max_length:
                output.finish_reason = FinishReason.LENGTH
                self._end(owner)
        self._counters.num_generated_tokens += num_tokens + len(outputs)
        return outputs

    def took(self, planned: SchedulerOutput, seconds: float) -> None:
        """Running `planned` took so long, which tells what drafts cost."""
        if self._drafts is None:
            return
        num_drafts = max((verify.num_draft_tokens for verify in planned.verifies), default=0)
        num_requests = len(planned.decodes) + len(planned.verifies)
        self._drafts.took(num_requests, num_drafts, seconds, sum(len(chunk.token_ids) for chunk in planned.chunks))

    def _end_verifies(self, planned: SchedulerOutput, result: StepOutput) -> None:
        """Requests are behind those of their drafts that were accepted, whatever was planned for them since."""
        assert self._drafts is not None
        num_new = dict(zip(result.slots, map(len, result.token_ids), strict=True))
        counters = self._counters
        for verify in planned.verifies:
            num_drafts, num_accepted = verify.num_draft_tokens, num_new[verify.slot] - 1
            self._drafts.observe(num_drafts, num_accepted)
            counters.num_verifies += 1
            for place in range(num_drafts):
                counters.num_drafted[place] += 1
                counters.num_accepted[place] += place < num_accepted
            state = self._running.get(verify.slot)
            if state is not None and state.first_step <= planned.step_id:
                state.num_computed += num_accepted
                state.num_unseen -= num_drafts

    def _insert_promised(self, state: RequestState, num_tokens: int, tail: int, step_id: int) -> None:
        """A prefill's snapshot was taken: share it at once, unless the request gave back its pages meanwhile."""
        if state.slot < 0 or state.first_step > step_id:
            self._tails.release(tail)
        else:
            num_pages = num_tokens // PAGE_TOKENS
            self._tree.insert(state.keys[:num_pages], state.pages[:num_pages], tail)

    def _end(self, state: RequestState) -> None:
        """The request is over: nothing of it stays but what the prefix tree keeps."""
        del self._requests[state.request_id]
        self._counters.num_finished += 1
        if state.slot >= 0:
            self._release(state)
        else:
            self._waiting.remove(state)

    def _release(self, state: RequestState) -> None:
        """Give back slot and pages; what a pending tail makes reusable goes to the prefix tree."""
        if state.pending_tail >= 0:
            # With steps in flight the tail may stand behind a token that is not known (and now never will be).
            if state.tail_tokens <= len(state.tokens):
                num_pages = state.tail_tokens // PAGE_TOKENS
                self._tree.insert(state.page_keys()[:num_pages], state.pages[:num_pages], state.pending_tail)
            else:
                self._tails.release(state.pending_tail)
        for page in state.pages:
            self._pages.release(page)
        del self._running[state.slot]
        self._prefilling.pop(state.slot, None)
        self._decoding.pop(state.slot, None)
        self._slots.release(state.slot)
        state.reset_run()
