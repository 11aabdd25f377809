"""All that the step loop knows of a model runner."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from dsv4serve.types import Constraint, SamplingParams, SchedulerOutput, StepOutput


class Runner(Protocol):
    """Turns the plan of a step into sampled tokens. Sizes are what it has allocated."""

    num_slots: int
    num_pages: int
    num_tails: int
    max_model_len: int
    vocab_size: int
    eos_token_id: int
    steps_ahead: int
    """Steps that may be submitted while the result of an earlier one is still to come."""

    def may_draft(self, params: SamplingParams, /) -> bool:
        """Whether it can make drafts for a request with these parameters without changing what tokens mean."""

    def prepare(self, constraint: Constraint, /) -> Future[None]:
        """Begin to make ready for a request with this constraint, beside the steps. The result raises InvalidRequest
        when it cannot be served. Requests without one need no preparation."""

    def submit(self, output: SchedulerOutput, /) -> Callable[[], StepOutput]:
        """Begin a step. What it returns waits for the result; results are asked for once each, in the order of the
        steps. A request whose drafts are still out goes on behind those that are accepted. Any exception of both means
        that the runner's state is lost."""

    def shutdown(self) -> None:
        """Give back what it holds; it is not used afterwards."""
