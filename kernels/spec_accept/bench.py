"""Time of judging drafts against its floor, on a GPU: `python -m dsv4_kernels.spec_accept.bench OUT.jsonl`.

Bytes: every logit of target and proposal once, 4 a token. FLOPs: an exponential and two additions a token; memory
decides. Rows of target and proposal are independent, so that some draft is refused and what is left must be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.benching import Measured, measure, num_copies, write_lines
from dsv4_kernels.cases import MODELS, PRO
from dsv4_kernels.spec_accept.cases import NUM_DRAFTS
from dsv4_kernels.spec_accept.triton import accept

ROWS = (1, 16, 64)  # requests


def make(requests: int, is_filtered: bool) -> dict[str, Tensor]:
    """Keyword arguments of `accept` on the GPU; a filter that cuts nothing costs as much as one that does."""
    vocab, k = PRO.vocab_size, NUM_DRAFTS
    target, proposal = (torch.randn(requests, n, vocab, device="cuda") * 4 for n in (k + 1, k))
    return {
        "target": target,
        "target_lasts": torch.full((requests, k + 1), vocab - 1, device="cuda"),
        "proposal": proposal,
        "proposal_lasts": torch.full((requests, k), vocab - 1, device="cuda"),
        "drafts": proposal.argmax(-1),
        "temperature": torch.ones(requests, device="cuda"),
        "is_filtered": torch.full((requests,), int(is_filtered), dtype=torch.uint8, device="cuda"),
        "coins": torch.rand(requests, k, dtype=torch.float64, device="cuda"),
        "draws": torch.rand(requests, k + 1, dtype=torch.float64, device="cuda"),
    }


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """One line for each number of requests, without and with filters. The models have one vocabulary."""
    for requests in ROWS:
        tokens = requests * (2 * NUM_DRAFTS + 1) * PRO.vocab_size
        for is_filtered, label in ((False, ""), (True, ", filtered")):
            cases = [make(requests, is_filtered) for _ in range(num_copies(4 * tokens))]
            calls = [lambda case=case: accept(**case) for case in cases]
            yield measure(calls, 4 * tokens, 3 * tokens).as_line(
                op=f"accept, {NUM_DRAFTS} drafts{label}", implementation="triton", shapes="released",
                num_tokens=requests,
            )  # fmt: skip


if __name__ == "__main__":
    write_lines(lines())
