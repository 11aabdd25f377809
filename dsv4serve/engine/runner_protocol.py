"""All that the step loop knows of a model runner."""

from __future__ import annotations

from typing import Protocol

from dsv4serve.types import SchedulerOutput, StepOutput


class Runner(Protocol):
    """Turns the plan of a step into sampled tokens. Sizes are what it has allocated."""

    num_slots: int
    num_pages: int
    num_tails: int
    max_model_len: int
    vocab_size: int
    eos_token_id: int

    def execute(self, output: SchedulerOutput, /) -> StepOutput:
        """Run one step to its end. Any exception means that the runner's state is lost."""

    def shutdown(self) -> None:
        """Give back what it holds; it is not used afterwards."""
