"""A scheduler with a fake runner, and the conservation laws that hold between any two steps."""

from __future__ import annotations

from collections import Counter
from typing import Any

from support.fake_runner import EOS, FakeRunner, generate_alone

from dsv4serve.scheduler import Scheduler
from dsv4serve.scheduler.drafts import DraftPolicy
from dsv4serve.types import FinishReason, Request, RequestOutput, SamplingParams, SchedulerOutput, StepOutput


class Bench:
    """Drives both and checks everything that can be checked from outside."""

    def __init__(
        self,
        num_slots: int = 4,
        num_pages: int = 16,
        num_tails: int = 6,
        max_model_len: int = 2048,
        max_step_tokens: int = 512,
        steps_in_flight: int = 1,
        num_draft_tokens: int = 0,
        adaptive: bool = False,
        **settings: Any,
    ) -> None:
        self.now = 0.0
        self.max_model_len, self.max_step_tokens, self.num_slots = max_model_len, max_step_tokens, num_slots
        self.scheduler = Scheduler(
            num_slots=num_slots,
            num_pages=num_pages,
            num_tails=num_tails,
            max_model_len=max_model_len,
            max_step_tokens=max_step_tokens,
            eos_token_id=EOS,
            drafts=DraftPolicy(num_draft_tokens, adaptive) if num_draft_tokens else None,
            clock=lambda: self.now,
            **settings,
        )
        # With steps in flight the counts seen here are of a later time than the write.
        owners = self.scheduler._pages.count if steps_in_flight == 1 else None
        self.runner = FakeRunner(num_slots, num_pages, num_tails, owners)
        self.steps_in_flight = steps_in_flight
        self.in_flight: list[tuple[SchedulerOutput, StepOutput]] = []
        self.requests: dict[str, Request] = {}
        self.results: dict[str, RequestOutput] = {}
        self.last_step: SchedulerOutput | None = None

    def add(
        self,
        request_id: str,
        prompt_ids: list[int],
        max_tokens: int = 4,
        priority: int = 0,
        salt: str = "",
        **sampling: Any,
    ) -> str:
        request = Request(
            request_id=request_id,
            prompt_ids=prompt_ids,
            sampling=SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, **sampling}),
            priority=priority,
            cache_salt=salt,
        )
        self.scheduler.add(request)
        self.requests[request_id] = request
        self.results[request_id] = RequestOutput(request_id=request_id, token_ids=[], logits=[], prompt_logits=[])
        return request_id

    def abort(self, request_id: str) -> None:
        output = self.scheduler.abort(request_id)
        assert (output is None) == (self.results[request_id].finish_reason is not None)
        if output is not None:
            assert output.finish_reason is FinishReason.ABORT
            self._merge(output)

    def step(self) -> bool:
        """Plan and run one step. False when there was nothing to do."""
        retractions = self.scheduler.stats().num_retractions
        planned = self.last_step = self.scheduler.schedule()
        if planned is not None:
            named = [*planned.decodes, *(item.slot for item in planned.chunks + planned.page_appends)]
            named += [item.slot for item in planned.snapshots + planned.verifies]
            assert set(named) <= set(self.scheduler._running), "the step names a slot whose request was retracted"
            if self.scheduler.stats().num_retractions > retractions:
                assert not planned.starts, "admitted what was given back in the same step"
            assert planned.num_tokens <= max(self.max_step_tokens, self.num_slots + 256)
            self.in_flight.append((planned, self.runner.execute(planned)))
            self.scheduler.took(planned, 1.0 + 0.05 * planned.num_tokens)
        if self.in_flight and (planned is None or len(self.in_flight) >= self.steps_in_flight):
            for output in self.scheduler.update(*self.in_flight.pop(0)):
                self._merge(output)
            return True
        return planned is not None

    def run(self, max_steps: int = 20000) -> None:
        """Until everything has ended."""
        for _ in range(max_steps):
            if not self.step():
                assert not self.scheduler.has_requests, "requests are open and nothing runs"
                return
        raise AssertionError(f"not done after {max_steps} steps")

    def _merge(self, output: RequestOutput) -> None:
        total = self.results[output.request_id]
        assert total.finish_reason is None, "output after the end"
        total.token_ids = total.token_ids + output.token_ids
        total.logits = [*total.logits, *output.logits]
        total.prompt_logits = [*total.prompt_logits, *output.prompt_logits]
        total.finish_reason, total.stop_token_id = output.finish_reason, output.stop_token_id
        if output.num_cached_tokens is not None:
            assert total.num_cached_tokens is None, "reported twice"
            total.num_cached_tokens = output.num_cached_tokens

    def history(self, request_id: str) -> list[int]:
        return self.requests[request_id].prompt_ids + self.results[request_id].token_ids

    def check_results(self) -> None:
        """Ended requests have the tokens they would have alone; aborted and open ones a prefix of them."""
        for request_id, result in self.results.items():
            alone = generate_alone(self.requests[request_id], self.max_model_len)
            if result.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert result.token_ids == alone
                assert (result.stop_token_id is not None) == (result.finish_reason is FinishReason.STOP)
            else:
                assert result.token_ids == alone[: len(result.token_ids)]

    def check_books(self) -> None:
        """Every page, slot and tail is free or owned, exactly as often as it is counted."""
        scheduler = self.scheduler
        running, nodes = list(scheduler._running.values()), list(scheduler._tree.nodes())
        promised = [tail for entries in scheduler._promised.values() for _, _, tail in entries]
        pages = Counter(page for state in running for page in state.pages) + Counter(node.page for node in nodes)
        tails = Counter(node.tail for node in nodes if node.tail >= 0) + Counter(promised)
        tails += Counter(state.pending_tail for state in running if state.pending_tail >= 0)
        slots = Counter(state.slot for state in running)
        for pool, owned in ((scheduler._pages, pages), (scheduler._tails, tails), (scheduler._slots, slots)):
            assert [pool.count(item) for item in range(pool.size)] == [owned[item] for item in range(pool.size)]
            assert sorted(pool._free) == [item for item in range(pool.size) if not owned[item]]
        assert max(tails.values(), default=0) <= 1
        assert scheduler._pages.num_evictable == sum(pages[node.page] == 1 for node in nodes)
        assert scheduler._tree.num_tails == sum(node.tail >= 0 for node in nodes)
        assert not any(state.prompt_logits for state in running if state.num_outputs), "rows that nobody will send"
        seen = set()
        for node in nodes:
            assert node.children or node.tail >= 0, "a leaf without a tail can never be hit"
            assert not any(child not in seen for child in node.children.values()), "recency: descendants come first"
            seen.add(node)
        open_ids = {request_id for request_id, result in self.results.items() if result.finish_reason is None}
        assert set(scheduler._requests) == open_ids
        assert len(running) + len(scheduler._waiting) == len(open_ids)

    def check_all_free(self) -> None:
        """After the last request only the prefix cache holds anything, and it lets go."""
        self.check_books()
        stats = self.scheduler.stats()
        sizes = [pool.size for pool in (self.scheduler._slots, self.scheduler._pages, self.scheduler._tails)]
        assert [stats.num_free_slots, stats.num_free_pages, stats.num_free_tails] == sizes
        self.scheduler.flush_prefix_cache()
        assert self.scheduler._pages.num_free == sizes[1]
        assert self.scheduler._tails.num_free == sizes[2]
