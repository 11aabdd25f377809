"""Per-slot state of the runner: page tables, progress, sampling. A step of decodes needs nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dsv4serve.runner.adjust import RowAdjustment, row_adjustment
from dsv4serve.types import PageAppend, SamplingParams, SlotStart


class SlotTable:
    """What the runner remembers of each slot between steps.

    Args:
        num_slots: slots of the cache.
        max_pages: pages that the longest request has.
        eos_token_id: of the model.
    """

    def __init__(self, num_slots: int, max_pages: int, eos_token_id: int) -> None:
        self._eos_token_id = eos_token_id
        self._page_table = np.full((num_slots, max_pages), -1, dtype=np.int64)
        self._num_pages = [0] * num_slots
        self.num_computed = [0] * num_slots
        self.num_prompt = [0] * num_slots
        self.num_outputs = [0] * num_slots
        self.last_token = [-1] * num_slots
        self.sampling: list[SamplingParams | None] = [None] * num_slots
        self.adjustments: list[RowAdjustment | None] = [None] * num_slots
        self._prompt_ids: list[list[int]] = [[] for _ in range(num_slots)]  # where its log probabilities are to be sent

    def start(self, start: SlotStart) -> None:
        """A request takes the slot."""
        slot = start.slot
        self._page_table[slot] = -1
        self._num_pages[slot] = 0
        self.num_computed[slot] = start.num_computed_tokens
        self.num_prompt[slot] = start.num_prompt_tokens
        self.num_outputs[slot] = start.num_output_tokens
        self.last_token[slot] = -1
        self.sampling[slot] = start.sampling
        self.adjustments[slot] = row_adjustment(start, self._eos_token_id)
        is_wanted = start.sampling.num_prompt_logprobs is not None and start.num_output_tokens == 0
        self._prompt_ids[slot] = start.token_ids if is_wanted else []

    def sampled(self, slot: int, token: int) -> None:
        """The slot's request got its next token."""
        self.last_token[slot] = token
        self.num_outputs[slot] += 1
        adjustment = self.adjustments[slot]
        if adjustment is not None:
            adjustment.append(token)

    def following_prompt_ids(self, slot: int, num_tokens: int) -> list[int]:
        """The prompt tokens after each of the next `num_tokens` ones, if their log probabilities were asked for."""
        first = self.num_computed[slot] + 1
        return self._prompt_ids[slot][first : first + num_tokens]

    def append(self, append: PageAppend) -> int:
        """Pages join the slot's table; returns the place of the first of them."""
        first = self._num_pages[append.slot]
        end = first + len(append.pages)
        self._page_table[append.slot, first:end] = append.pages
        self._num_pages[append.slot] = end
        return first

    def page_table(self, slots: list[int]) -> npt.NDArray[np.int64]:
        """int64 [len(slots), most pages of any of them], -1 = none."""
        width = max((self._num_pages[slot] for slot in slots), default=0)
        return self._page_table[slots, :width]

    def params(self, slot: int) -> SamplingParams:
        """Sampling parameters of the request in `slot`."""
        params = self.sampling[slot]
        assert params is not None, f"slot {slot} has no request"
        return params
