"""Log probabilities in Triton: `token_logprobs` of the reference in two launches, nothing read back to the host.

The best tokens of every chunk, then the best of these: one pass over the row, whatever `num_top` is. A token is an
integer that orders by logit and, among equal ones, by lower id, so every maximum is unique.

Accuracy on a GPU, for a row of up to 2^17 tokens: `ex2.approx` is 2^-22 off, its argument and the tree of sums within a
chunk about 1e-6, and `lg2.approx` 2^-22 of a logarithm that is at most 17. Together below 6e-6, and half a unit in the
last place for each of the two subtractions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # tokens of one program
MAX_TOP = 64  # best tokens that can be asked for


@triton.jit
def _key(logit, token):
    """int64 in the order of (logit, lower id); -0.0 and 0.0 are equal."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (ordered << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit(do_not_specialize=["num_top"])
def _chunks(logits, peaks, sums, keys, vocab, row_step, num_top, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    value = tl.load(logits + row * row_step + token, mask=inside, other=float("-inf"))
    peak = tl.max(value)
    at = row * tl.num_programs(1) + chunk
    tl.store(peaks + at, peak)
    tl.store(sums + at, tl.sum(tl.where(value == float("-inf"), 0.0, tl.exp(value - peak))))
    left = tl.where(inside, _key(value, token), -0x7FFFFFFFFFFFFFFF)
    for rank in range(num_top):
        largest = tl.max(left)
        tl.store(keys + at * num_top + rank, largest)
        left = tl.where(left == largest, -0x7FFFFFFFFFFFFFFF, left)


@triton.jit(do_not_specialize=["num_top"])
def _rows(
    logits,
    token_ids,
    peaks,
    sums,
    keys,  # int64 [rows, chunks, num_top]
    chosen_logprobs,
    top_ids,
    top_logprobs,
    row_step,
    num_chunks,
    num_top,
    CHUNKS: tl.constexpr,
    KEYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    peak = tl.load(peaks + row * num_chunks + chunk, mask=inside, other=float("-inf"))
    top = tl.max(peak)
    mass = tl.load(sums + row * num_chunks + chunk, mask=inside, other=0.0)
    total = tl.log(tl.sum(tl.where(mass > 0, mass * tl.exp(peak - top), 0.0)))
    chosen = tl.load(logits + row * row_step + tl.load(token_ids + row))
    tl.store(chosen_logprobs + row, chosen - top - total)
    key = tl.arange(0, KEYS)
    left = tl.load(keys + row * num_chunks * num_top + key, mask=key < num_chunks * num_top, other=-0x7FFFFFFFFFFFFFFF)
    for rank in range(num_top):
        largest = tl.max(left)
        left = tl.where(left == largest, -0x7FFFFFFFFFFFFFFF, left)
        ordered = (largest >> 32).to(tl.int32)
        logit = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(top_ids + row * num_top + rank, 0x7FFFFFFF - (largest & 0x7FFFFFFF))
        tl.store(top_logprobs + row * num_top + rank, logit - top - total)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `token_logprobs` of the reference: logits float32 [B, V], token_ids int64 [B].

    Returns float32 [B], int64 [B, num_top], float32 [B, num_top]. Raises ValueError for more than 64 or V best tokens.
    """
    num_rows, vocab = logits.shape
    if not 0 <= num_top <= min(MAX_TOP, vocab) or logits.stride(1) != 1 or logits.dtype is not torch.float32:
        raise ValueError(
            f"token_logprobs: num_top is {num_top}, logits {logits.dtype} {list(logits.shape)} with strides "
            f"{logits.stride()}; expected at most {min(MAX_TOP, vocab)}, torch.float32 and stride 1"
        )
    num_chunks = triton.cdiv(vocab, CHUNK)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, device=logits.device, dtype=dtype)

    chosen, top_ids, top = empty(num_rows), empty(num_rows, num_top, dtype=torch.int64), empty(num_rows, num_top)
    if num_rows:
        peaks, sums = empty(num_rows, num_chunks), empty(num_rows, num_chunks)
        keys = empty(num_rows, num_chunks, num_top, dtype=torch.int64)
        _chunks[(num_rows, num_chunks)](
            logits, peaks, sums, keys, vocab, logits.stride(0), num_top, CHUNK=CHUNK, num_warps=8
        )
        _rows[(num_rows,)](
            logits, token_ids, peaks, sums, keys, chosen, top_ids, top, logits.stride(0), num_chunks, num_top,
            CHUNKS=triton.next_power_of_2(num_chunks), KEYS=triton.next_power_of_2(max(1, num_chunks * num_top)),
            num_warps=8,
        )  # fmt: skip
    return chosen, top_ids, top
