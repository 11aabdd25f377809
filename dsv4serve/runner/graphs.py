"""CUDA graphs of steps, one per bucket, captured at start-up so that no request waits for a compiler."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from dsv4_kernels.metadata.plan import LAST_TOKEN
from dsv4serve.runner.device_batch import (
    BatchOutput,
    DeviceForward,
    bucket_of,
    empty_inputs,
    fill_inputs,
)
from dsv4serve.types import PAGE_TOKENS

HOST_BUFFERS = 2  # of a bucket: one is filled while the copy of the step before may not have been read


class Bucket(NamedTuple):
    """What a step is padded to. One row a request and one for each of its drafts: nothing but decodes and verifies."""

    num_rows: int
    num_requests: int
    num_drafts: int = 0  # most of a request


def max_step_rows(max_step_tokens: int, num_slots: int, num_draft_tokens: int) -> int:
    """Rows of the largest step: a chunk gets one page even beside decodes in every slot, and a bucket of its own."""
    return max(max_step_tokens, num_slots + PAGE_TOKENS, bucket_of(num_slots) * (1 + num_draft_tokens) + 1)


def buckets(num_slots: int, max_rows: int, num_draft_tokens: int) -> list[Bucket]:
    """Of steps with up to `num_slots` requests and `max_rows` rows, by ascending numbers of drafts: decodes, then steps
    with chunks, which have no drafts or the most."""
    requests = sorted({bucket_of(size) for size in range(1, num_slots + 1)})
    found = []
    for num_drafts in range(num_draft_tokens + 1):
        found += [Bucket(size * (1 + num_drafts), size, num_drafts) for size in requests]
        if num_drafts in (0, num_draft_tokens):
            least = requests[-1] * (1 + num_drafts) + 1
            rows = sorted({bucket_of(size) for size in range(least, max(max_rows, least) + 1)})
            found += [Bucket(size, requests[-1], num_drafts) for size in rows]
    return found


def bucket_for(counts: Sequence[int], num_slots: int, num_drafts: int = 0, num_draft_tokens: int = 0) -> Bucket:
    """The bucket of a step of requests with so many rows each, of which at most `num_drafts` are drafts.

    One with chunks has more rows than one with as many drafts and none, so that the two are never mixed up.
    """
    if max(counts) <= 1 + num_drafts:
        size = bucket_of(len(counts))
        return Bucket(size * (1 + num_drafts), size, num_drafts)
    most, num_drafts = bucket_of(num_slots), num_draft_tokens if num_drafts else 0
    return Bucket(bucket_of(max(sum(counts), most * (1 + num_drafts) + 1)), most, num_drafts)


class StepGraphs:
    """Steps of up to `num_slots` requests and `max_rows` rows: replayed graphs on CUDA, the same forward run eagerly
    elsewhere and where nothing was captured.

    All graphs share one memory pool and one buffer for logits, because one runs at a time: what a step leaves is valid
    until the next is begun.
    """

    def __init__(self, forward: DeviceForward, num_slots: int, max_rows: int, num_draft_tokens: int) -> None:
        self._forward, self._num_slots, self._num_draft_tokens = forward, num_slots, num_draft_tokens
        self._is_cuda = forward.device.type == "cuda"
        self.buckets = buckets(num_slots, max_rows, num_draft_tokens)
        self._host: dict[Bucket, list[tuple[Tensor, Tensor]]] = {}  # the next one to be filled is the first
        self._inputs: dict[Bucket, tuple[Tensor, Tensor]] = {}
        self._replays: dict[Bucket, tuple[Callable[[], None], BatchOutput]] = {}

    @torch.inference_mode()
    def capture(self, progress: bool = False) -> None:
        """Run all buckets, the largest first, so that no step needs a kernel that is not there; on CUDA capture them,
        the smaller ones in the memory of the larger. Padding only: writes nothing."""
        pool = torch.cuda.graph_pool_handle() if self._is_cuda else None
        for bucket in track(sorted(self.buckets, reverse=True), "capturing graphs", progress):
            self.eager(bucket)  # compiles
            if not self._is_cuda:
                continue
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with _no_collection(), torch.cuda.graph(graph, pool=pool):
                output = self._forward(*self._inputs[bucket], bucket.num_drafts, keeps_rows=False)
            self._replays[bucket] = graph.replay, output

    def run(
        self, columns: dict[str, Sequence[int | float]], token_ids: Sequence[int], keeps_rows: bool = False
    ) -> BatchOutput:
        """One step.

        Args:
            columns: inputs of its requests, by name.
            token_ids: of its rows; LAST_TOKEN = what the request's slot sampled last, and its drafts.
            keeps_rows: the rows' streams are wanted too; such a step runs eagerly.
        """
        num_drafts = max(map(int, columns["num_drafts"]))
        counts = list(map(int, columns["count"]))
        bucket = bucket_for(counts, self._num_slots, num_drafts, self._num_draft_tokens)
        self.fill(bucket, columns, token_ids)
        return self.replay(bucket) if bucket in self._replays and not keeps_rows else self.eager(bucket, keeps_rows)

    def fill(self, bucket: Bucket, columns: dict[str, Sequence[int | float]], token_ids: Sequence[int]) -> None:
        """Bring a step's numbers to the device, without waiting for it."""
        host = self._buffers(bucket)
        inputs, ids = host[0]
        host.append(host.pop(0))
        fill_inputs(inputs, columns)
        ids[: len(token_ids)] = torch.tensor(token_ids)
        for target, source in zip(self._inputs[bucket], (inputs, ids), strict=True):
            target.copy_(source, non_blocking=True)

    def inputs(self, bucket: Bucket) -> Tensor:
        """int64 [INPUTS, requests] of the bucket's last step, on the device."""
        return self._inputs[bucket][0]

    def replay(self, bucket: Bucket) -> BatchOutput:
        """The captured step with the numbers that were filled in last."""
        graph, output = self._replays[bucket]
        graph()
        return output

    def eager(self, bucket: Bucket, keeps_rows: bool = False) -> BatchOutput:
        """The same without a graph; padding alone if nothing was filled in."""
        self._buffers(bucket)
        return self._forward(*self._inputs[bucket], bucket.num_drafts, keeps_rows=keeps_rows)

    def _buffers(self, bucket: Bucket) -> list[tuple[Tensor, Tensor]]:
        if bucket not in self._host:
            self._host[bucket] = [
                (
                    empty_inputs(bucket.num_requests, pinned=self._is_cuda),
                    torch.full((bucket.num_rows,), LAST_TOKEN, dtype=torch.int64, pin_memory=self._is_cuda),
                )
                for _ in range(HOST_BUFFERS)
            ]
            inputs, ids = (tensor.to(self._forward.device, copy=True) for tensor in self._host[bucket][0])
            self._inputs[bucket] = inputs, ids
        return self._host[bucket]


@contextmanager
def _no_collection() -> Iterator[None]:
    """The collector may find an older engine's graphs, and freeing one spoils a capture that is under way."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def track(items: list[Bucket], label: str, wanted: bool) -> Iterator[Bucket]:
    """The items, with a bar on stderr; silent unless it is wanted and stderr is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    disable = not (wanted and sys.stderr.isatty())
    with Progress(*columns, console=Console(stderr=True), disable=disable, transient=True) as bar:
        yield from bar.track(items, description=label)
