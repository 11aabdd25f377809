"""Some steps computed again with the reference kernels: how far the fast ones are from them (`--shadow-steps`).

The references run first, on copies of what the step changes; then the step runs as always, and what it leaves is its
own.
"""

from __future__ import annotations

import logging

from torch import Tensor

from dsv4_kernels import cpu
from dsv4_kernels.metadata import StepMetadata
from dsv4serve.memory import CachePools
from dsv4serve.model.transformer import Transformer
from dsv4serve.runner.paged import PagedStep
from dsv4serve.types import StepOutput

logger = logging.getLogger(__name__)


class ShadowCheck:
    """Takes one of `every` steps. Compared are the logits of each request's last row, sampled or not."""

    def __init__(self, transformer: Transformer, pools: CachePools, every: int) -> None:
        self._transformer, self._pools, self._every = transformer, pools, every
        self._num_steps = 0

    def expect(self, token_ids: Tensor, metadata: StepMetadata) -> Tensor | None:
        """Before a step: the reference's logits float32 [requests, vocab], or None if it is not this step's turn."""
        self._num_steps += 1
        if self._num_steps % self._every:
            return None
        # Rows of pages need no copy: the step writes them again before it reads them.
        slots = metadata.slots
        before = self._pools.copy_slots(slots)
        with cpu.references():
            streams = self._transformer(token_ids, PagedStep(self._pools, metadata))
            logits = self._transformer.logits(streams[_last_rows(metadata)])
        self._pools.put_slots(slots, before)
        return logits

    def compare(self, expected: Tensor, streams: Tensor, metadata: StepMetadata, result: StepOutput) -> None:
        """After it: `streams` [rows, c, hidden] of the step against what was expected."""
        logits = self._transformer.logits(streams[_last_rows(metadata)])
        result.num_shadow_rows = len(logits)
        result.num_shadow_flips = int((logits.argmax(-1) != expected.argmax(-1)).sum())
        result.shadow_drift = float((logits - expected).norm() / expected.norm())
        level = logging.WARNING if result.num_shadow_flips else logging.INFO
        logger.log(
            level,
            "shadow check: logits of %d rows differ from the reference kernels' by %.2g of their norm; %d other tokens",
            *(result.num_shadow_rows, result.shadow_drift, result.num_shadow_flips),
        )


def _last_rows(metadata: StepMetadata) -> list[int]:
    """Of each request."""
    return [*(first - 1 for first in metadata.first_rows[1:]), metadata.num_rows - 1]
