"""Time of sampling against its floor, on a GPU: `python -m dsv4_kernels.sampling.bench OUT.jsonl`.

Bytes: every logit once, 4 a token. FLOPs: an exponential and two additions a token; memory decides. Logits are normal
with the deviation that the run names: 4 keeps few tokens, as language models do; 1 is flat, so that top-p keeps tens of
thousands and each token of a row is added to its histogram. Beside it: the same filters by a sort of every row in plain
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4_kernels.benching import Measured, measure, num_copies, write_lines
from dsv4_kernels.cases import MODELS, PRO
from dsv4_kernels.sampling import triton as sampling
from dsv4_kernels.sampling.logprobs import token_logprobs

ROWS = (1, 16, 64, 256)
# Name: deviation, temperature, top-k, top-p, min-p.
RUNS = {
    "greedy": (4.0, 0.0, 0, 1.0, 0.0),
    "no filter": (4.0, 1.0, 0, 1.0, 0.0),
    "top-k 50": (4.0, 1.0, 50, 1.0, 0.0),
    "top-p 0.95": (4.0, 1.0, 0, 0.95, 0.0),
    "min-p 0.05": (4.0, 1.0, 0, 1.0, 0.05),
    "flat top-p 0.95": (1.0, 1.0, 0, 0.95, 0.0),
}


def floor_bytes(num_rows: int, vocab: int) -> int:
    """Bytes that one step must move."""
    return 4 * num_rows * vocab


def flops(num_rows: int, vocab: int) -> int:
    """Floating-point operations of one step."""
    return 3 * num_rows * vocab


def make(num_rows: int, deviation: float, *values: float) -> dict[str, Tensor]:
    """Keyword arguments of `sample` on the GPU."""
    names = ("temperature", "top_k", "top_p", "min_p")
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32)
    return {
        "logits": torch.randn(num_rows, PRO.vocab_size, device="cuda") * deviation,
        "uniform": torch.rand(num_rows, device="cuda", dtype=torch.float64),
    } | {
        name: torch.full((num_rows,), value, device="cuda", dtype=dtype)
        for name, value, dtype in zip(names, values, dtypes, strict=True)
    }


def by_sort(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """The filters on sorted rows; greedy and unfiltered rows alike."""
    values, ids = logits.sort(dim=-1, descending=True)
    probs = torch.softmax(values / temperature.clamp_min(1e-6).unsqueeze(1), -1)
    rank = torch.arange(probs.shape[1], device=probs.device)
    probs = torch.where((rank < top_k.unsqueeze(1)) | (top_k == 0).unsqueeze(1), probs, 0.0)
    before = probs.cumsum(-1) - probs
    kept = (before < top_p.unsqueeze(1) * probs.sum(-1, keepdim=True)) & (probs >= min_p.unsqueeze(1) * probs[:, :1])
    sums = torch.where(kept, probs, 0.0).cumsum(-1)
    place = torch.searchsorted(sums, uniform.float().unsqueeze(1) * sums[:, -1:], right=True)
    return ids.gather(1, place.clamp_max(probs.shape[1] - 1)).squeeze(1)


def lines(models: Collection[str] = MODELS, measure: Callable[..., Measured] = measure) -> Iterator[dict[str, Any]]:
    """One line for each implementation, setting and number of rows; log probabilities with the 20 best.

    The models have one vocabulary.
    """
    vocab = PRO.vocab_size
    for num_rows in ROWS:
        moved, work = floor_bytes(num_rows, vocab), flops(num_rows, vocab)
        copies = num_copies(moved)
        for name, values in RUNS.items():
            cases = [make(num_rows, *values) for _ in range(copies)]
            runs = {"triton": [lambda case=case: sampling.sample(**case) for case in cases]}
            if name == "top-p 0.95":
                runs["sort"] = [lambda case=case: by_sort(**case) for case in cases]
            for label, calls in runs.items():
                yield measure(calls, moved, work).as_line(
                    op=f"sample, {name}", implementation=label, shapes="released", num_tokens=num_rows
                )
        ids = torch.randint(0, vocab, (num_rows,), device="cuda")
        calls = [lambda case=case, ids=ids: token_logprobs(case["logits"], ids, 20) for case in cases]
        yield measure(calls, moved, work).as_line(
            op="token_logprobs, 20 best", implementation="triton", shapes="released", num_tokens=num_rows
        )


if __name__ == "__main__":
    write_lines(lines())
