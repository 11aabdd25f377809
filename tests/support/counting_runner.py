"""A runner without a model, for tests of the processes around it: the token after position p is p % 100 + 1.

The first prompt token gives orders: see the constants.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dsv4serve.config import EngineConfig
from dsv4serve.types import CheckpointError, SchedulerOutput, StepOutput

VOCAB, EOS = 1000, 0
STEP_S = 0.01
FAIL, STUCK = 901, 902  # raise in execute; never come back from it


class CountingRunner:
    num_slots, num_pages, num_tails = 8, 64, 8
    max_model_len, vocab_size, eos_token_id = 4096, VOCAB, EOS

    def __init__(self, steps_ahead=0):
        self.steps_ahead = steps_ahead
        self.position = {}
        self.was_shut_down = False
        self.events = []  # ("submit" or "result", step)

    def submit(self, output: SchedulerOutput) -> Callable[[], StepOutput]:
        self.events.append(("submit", output.step_id))
        result = self._run(output)

        def take_result():
            time.sleep(STEP_S)
            self.events.append(("result", output.step_id))
            return result

        return take_result

    def _run(self, output: SchedulerOutput) -> StepOutput:
        for start in output.starts:
            self.position[start.slot] = start.num_computed_tokens
        sampled = list(output.decodes)
        for slot in output.decodes:
            self.position[slot] += 1
        for chunk in output.chunks:
            if chunk.token_ids[0] == FAIL:
                raise FloatingPointError("NaN in the logits")
            if chunk.token_ids[0] == STUCK:
                time.sleep(3600)
            self.position[chunk.slot] += len(chunk.token_ids)
            if chunk.samples:
                sampled.append(chunk.slot)
        tokens = [[expected_token(self.position[slot])] for slot in sampled]
        return StepOutput(step_id=output.step_id, slots=sampled, token_ids=tokens)

    def shutdown(self) -> None:
        self.was_shut_down = True


def expected_token(position: int) -> int:
    """The token sampled once `position` tokens are computed."""
    return position % 100 + 1


def build(config: EngineConfig) -> CountingRunner:
    return CountingRunner()


def build_failing(config: EngineConfig) -> CountingRunner:
    raise CheckpointError("model-00001.safetensors: 12 bytes are missing")


def build_crashing(config: EngineConfig) -> CountingRunner:
    raise RuntimeError("a bug at start-up")
