"""The capacity plan: a byte budget in, slots, pages and tails out. One knob, no ratios to tune.

Slots come first (they are what runs), then tails and pages share the rest. A fifth of the rest goes to tails: a tail
of Pro weighs as much as 5 to 6 pages, and a conversation of 8K tokens owns 32 pages and one or two tails.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4serve.memory.layout import CacheLayout
from dsv4serve.types import PAGE_TOKENS, CapacityError

TAIL_SHARE = 0.2  # of what slots leave


@dataclass(frozen=True)
class CapacityPlan:
    """How many of each a budget holds, and what they weigh."""

    layout: CacheLayout
    num_slots: int
    num_pages: int
    num_tails: int
    max_model_len: int  # tokens of one request that always fit

    @property
    def total_bytes(self) -> int:
        """Bytes of all slots, pages and tails."""
        layout = self.layout
        slots, pages = self.num_slots * layout.slot_bytes, self.num_pages * layout.page_bytes
        return slots + pages + self.num_tails * layout.tail_bytes

    @property
    def num_cached_tokens(self) -> int:
        """Token positions that all pages hold together."""
        return self.num_pages * PAGE_TOKENS


def plan_capacity(
    layout: CacheLayout, budget_bytes: int, num_slots: int, position_limit: int, max_model_len: int = 0
) -> CapacityPlan:
    """Divide `budget_bytes`.

    Args:
        num_slots: requests that run at once.
        position_limit: max_position_embeddings of the model.
        max_model_len: tokens per request asked for; 0 = as many as model and budget allow.

    Raises:
        CapacityError: the budget cannot hold the slots and one request of max_model_len; names what would do.
    """
    if max_model_len > position_limit:
        raise CapacityError(
            f"max_model_len {max_model_len} exceeds max_position_embeddings {position_limit} of the model"
        )
    rest = budget_bytes - num_slots * layout.slot_bytes
    needed_pages = -(-max(max_model_len, PAGE_TOKENS) // PAGE_TOKENS)
    # A request that is the only one must always fit, and it wants one tail to be reusable.
    needed_bytes = num_slots * layout.slot_bytes + needed_pages * layout.page_bytes + layout.tail_bytes
    if rest < needed_pages * layout.page_bytes + layout.tail_bytes:
        raise CapacityError(
            f"the cache budget of {budget_bytes:,} bytes is too small: {num_slots} slots of {layout.slot_bytes:,}, "
            f"{needed_pages} pages of {layout.page_bytes:,} and one tail need {needed_bytes:,}; "
            "raise --cache-bytes or lower --max-running-requests or --max-model-len"
        )
    num_tails = max(1, min(int(rest * TAIL_SHARE), rest - needed_pages * layout.page_bytes) // layout.tail_bytes)
    # A model without compressed layers stores nothing in pages; they then only number positions.
    page_bytes = max(layout.page_bytes, 1)
    most_pages = num_slots * -(-position_limit // PAGE_TOKENS) * 4  # beyond this the prefix cache gains nothing
    num_pages = min((rest - num_tails * layout.tail_bytes) // page_bytes, most_pages)
    num_tails = min(num_tails, num_pages)  # every tail stands at the end of some page
    longest = min(position_limit, num_pages * PAGE_TOKENS)
    return CapacityPlan(layout, num_slots, num_pages, num_tails, max_model_len or longest)
