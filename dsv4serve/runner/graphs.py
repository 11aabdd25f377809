"""CUDA graphs of decode steps, one per batch bucket, captured at start-up so that no request waits for a compiler."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from dsv4serve.runner.device_batch import LAST_TOKEN, BatchOutput, DeviceForward, bucket_of, host_inputs


def decode_buckets(num_slots: int) -> list[int]:
    """Batch sizes that decodes are padded to, ascending."""
    return sorted({bucket_of(size) for size in range(1, num_slots + 1)})


def token_buckets(max_step_tokens: int) -> list[int]:
    """Numbers of rows that steps with prefill are padded to, ascending."""
    return sorted({bucket_of(size) for size in range(1, max_step_tokens + 1)})


class DecodeSteps:
    """Decodes of up to `num_slots` requests: replayed graphs on CUDA, the same forward run eagerly elsewhere.

    All graphs share one memory pool, because one runs at a time: what a step leaves is valid until the next.
    """

    def __init__(self, forward: DeviceForward, num_slots: int) -> None:
        self._forward = forward
        self.buckets = decode_buckets(num_slots)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._outputs: dict[int, BatchOutput] = {}
        is_cuda = forward.device.type == "cuda"
        self.host = {bucket: host_inputs(bucket, pinned=is_cuda) for bucket in self.buckets}
        self._inputs = {bucket: inputs.to(forward.device) for bucket, inputs in self.host.items()}
        self._token_ids = {
            bucket: torch.full((bucket,), LAST_TOKEN, dtype=torch.int64, device=forward.device)
            for bucket in self.buckets
        }

    @torch.inference_mode()
    def capture(self, progress: bool = False) -> None:
        """Capture all buckets, the largest first, whose memory the others then use. Padding only: writes nothing."""
        pool = torch.cuda.graph_pool_handle()
        for bucket in track(self.buckets[::-1], "capturing decode graphs", progress):
            self.eager(bucket)  # compiles
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._outputs[bucket] = self._forward(self._inputs[bucket], self._token_ids[bucket])
            self._graphs[bucket] = graph.replay

    def run(self, bucket: int) -> BatchOutput:
        """One step with the numbers in `host[bucket]`."""
        if bucket not in self._graphs:
            return self.eager(bucket)
        self._inputs[bucket].copy_(self.host[bucket], non_blocking=True)
        self._graphs[bucket]()
        return self._outputs[bucket]

    def eager(self, bucket: int) -> BatchOutput:
        """The same without a graph."""
        self._inputs[bucket].copy_(self.host[bucket], non_blocking=True)
        return self._forward(self._inputs[bucket], self._token_ids[bucket])


def track(buckets: list[int], label: str, wanted: bool) -> Iterator[int]:
    """The buckets, with a bar on stderr; silent unless it is wanted and stderr is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    disable = not (wanted and sys.stderr.isatty())
    with Progress(*columns, console=Console(stderr=True), disable=disable, transient=True) as bar:
        yield from bar.track(buckets, description=label)


def warm_prefill(forward: DeviceForward, max_step_tokens: int, num_slots: int, progress: bool = False) -> None:
    """Run every number of rows once, with padding only, so that all kernels of eager steps are compiled."""
    inputs: Tensor = host_inputs(bucket_of(num_slots), pinned=False).to(forward.device)
    with torch.inference_mode():
        for bucket in track(token_buckets(max_step_tokens), "compiling prefill kernels", progress):
            forward(inputs, torch.zeros(bucket, dtype=torch.int64, device=forward.device))
