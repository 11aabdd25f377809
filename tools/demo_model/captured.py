"""Forward and backward of a training part as CUDA graphs, because launching from Python takes longer than the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Part = Callable[[Tensor, Tensor], dict[str, Tensor]]
WARM_UPS = 2  # calls before the capture: compilation, and what is made once


class _Graph:
    def __init__(self, part: Part, tokens: Tensor, categories: Tensor, pool: tuple[int, int]) -> None:
        self._inputs = (tokens, categories)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._outputs = part(tokens, categories)

    def __call__(self, tokens: Tensor, categories: Tensor) -> dict[str, Tensor]:
        for mine, new in zip(self._inputs, (tokens, categories), strict=True):
            mine.copy_(new)
        self._graph.replay()
        # The graphs share their memory: the next replay overwrites this one's.
        return {name: value.clone() for name, value in self._outputs.items()}


def capture(parts: Mapping[str, Part], tokens: Tensor, categories: Tensor) -> dict[str, Part]:
    """Graphs of `parts` for inputs of these shapes, in one pool of memory: one of them runs at a time.

    A part waits for nothing on the host, and accumulates gradients in place in tensors that exist already and stay
    where they are. Warming up and capturing change them.
    """
    inputs = (tokens.clone(), categories.clone())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for part in parts.values():
            for _ in range(WARM_UPS):
                part(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    pool = torch.cuda.graph_pool_handle()
    return {key: _Graph(part, *inputs, pool) for key, part in parts.items()}
