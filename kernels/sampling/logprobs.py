"""Log probabilities in Triton: `token_logprobs` of the reference in two launches, nothing read back to the host.

`_chunks` reads the row once, whatever `num_top` is, and keeps the largest logit of every block of tokens. The N best
tokens of a row are in the N blocks whose largest are the best, equal ones by order: each token outside them has one in
each of these blocks before it. So `_rows` chooses N blocks, and N tokens among theirs. A token, or a block, is an
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

from dsv4_kernels.dependent import launches_early, wait_for_previous

CHUNK = 4096  # tokens of one program
WIDTH = 128  # tokens of a block
MAX_TOP = 64  # best tokens that can be asked for
LEAST: tl.constexpr = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # below all keys


@triton.jit
def _key(logit, token):
    """int64 in the order of (logit, lower id); -0.0 and 0.0 are equal."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (ordered << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def _id_of(key):
    """The token or block of a key."""
    return (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _chunks(logits, peaks, sums, best, vocab, row_step, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    wait_for_previous()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits + row * row_step + token, mask=token < vocab, other=float("-inf"))
    peak = tl.max(value)
    at = row * tl.num_programs(1) + chunk
    tl.store(peaks + at, peak)
    tl.store(sums + at, tl.sum(tl.where(value == float("-inf"), 0.0, tl.exp(value - peak))))
    blocks = tl.max(tl.reshape(value, [CHUNK // WIDTH, WIDTH]), axis=1)
    tl.store(best + at * (CHUNK // WIDTH) + tl.arange(0, CHUNK // WIDTH), blocks)


@triton.jit(do_not_specialize=["num_top"])
def _rows(
    logits,
    token_ids,
    peaks,
    sums,
    best,  # float32 [rows, chunks, CHUNK / WIDTH], largest logits
    chosen_logprobs,
    top_ids,
    top_logprobs,
    vocab,
    row_step,
    num_chunks,
    num_top,
    CHUNKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    peak = tl.load(peaks + row * num_chunks + chunk, mask=inside, other=float("-inf"))
    top = tl.max(peak)
    mass = tl.load(sums + row * num_chunks + chunk, mask=inside, other=0.0)
    total = tl.log(tl.sum(tl.where(mass > 0, mass * tl.exp(peak - top), 0.0)))
    logits += row * row_step
    chosen = tl.load(logits + tl.load(token_ids + row))
    tl.store(chosen_logprobs + row, chosen - top - total)
    block, lane = tl.arange(0, BLOCKS), tl.arange(0, TOP)
    num_blocks = tl.cdiv(vocab, WIDTH)
    step = num_chunks * (BLOCKS // CHUNKS)
    value = tl.load(best + row * step + block, mask=block < num_blocks, other=float("-inf"))
    left = tl.where(block < num_blocks, _key(value, block), LEAST)
    chosen_blocks = tl.full([TOP], 0x7FFFFFFF // WIDTH, tl.int32)
    for rank in range(tl.minimum(num_top, num_blocks)):
        largest = tl.max(left)
        left = tl.where(left == largest, LEAST, left)
        chosen_blocks = tl.where(lane == rank, _id_of(largest), chosen_blocks)
    token = chosen_blocks[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    value = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
    keys = tl.where(token < vocab, _key(value, token), LEAST)
    for rank in range(num_top):
        largest = tl.max(keys)
        keys = tl.where(keys == largest, LEAST, keys)
        ordered = (largest >> 32).to(tl.int32)
        logit = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(top_ids + row * num_top + rank, _id_of(largest).to(tl.int64))
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
        best, chunks = empty(num_rows, num_chunks, CHUNK // WIDTH), triton.next_power_of_2(num_chunks)
        _chunks[(num_rows, num_chunks)](
            logits,
            peaks,
            sums,
            best,
            vocab,
            logits.stride(0),
            CHUNK=CHUNK,
            WIDTH=WIDTH,
            num_warps=8,
            launch_pdl=launches_early(logits.device),
        )
        _rows[(num_rows,)](
            logits, token_ids, peaks, sums, best, chosen, top_ids, top, vocab, logits.stride(0), num_chunks, num_top,
            CHUNKS=chunks, BLOCKS=chunks * (CHUNK // WIDTH), TOP=triton.next_power_of_2(max(1, num_top)), WIDTH=WIDTH,
            num_warps=8,
            launch_pdl=launches_early(logits.device),
        )  # fmt: skip
    return chosen, top_ids, top
