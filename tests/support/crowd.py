"""One request of the device's network alone and among others: what it leaves must have the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from support.device_engine import Cache, _planes
from support.models import random_ids
from torch import Tensor

from dsv4_kernels.metadata import Rows, StepMetadata
from dsv4serve.config import Numerics
from dsv4serve.memory import CacheLayout, CachePools, LayerCache
from dsv4serve.model.device import DeviceTransformer
from dsv4serve.model.transformer import Transformer
from dsv4serve.runner.device_batch import bucket_of
from dsv4serve.runner.device_step import PagedDeviceStep
from dsv4serve.runner.paged import PagedStep
from dsv4serve.types import PAGE_TOKENS

Step = tuple[int, list[int]]  # tokens of the request, and of each of the others


@torch.inference_mode()
def prefill(reference: Transformer, ids: list[int]) -> list[Tensor]:
    """What the cache of the CPU engine holds of a request with these tokens, which fit into two pages."""
    cache = Cache(CacheLayout.build(reference.config, Numerics.OFFICIAL), "cpu")
    table = cache.page_table[:1].numpy().astype(np.int64)
    metadata = StepMetadata(slots=[0], starts=[0], counts=[len(ids)], page_table=table, page_tokens=PAGE_TOKENS)
    reference(torch.tensor(ids), PagedStep(cache.pools, metadata))
    return [plane[index].clone() for plane, index in _held(cache.pools, 0, cache.page_table[0])]


@torch.inference_mode()
def run(
    network: DeviceTransformer, ids: list[int], steps: list[Step], held: list[Tensor] | None = None, num_held: int = 0
) -> list[Tensor]:
    """Bytes of the logits of a request's rows, then of all that the cache holds of it at the end.

    `ids` are its tokens, of which `num_held` are in the cache: `held` by `prefill`. It comes last in each step, in the
    last slot; the others begin anew whenever they would outgrow their pages.
    """
    device, vocab = network.device, network.config.vocab_size
    num_slots = 1 + max(len(others) for _, others in steps)
    pages_each = 2
    pools = CachePools(
        CacheLayout.build(network.config, Numerics.OFFICIAL), num_slots, num_slots * pages_each, 1, device
    )
    for layer in pools.layers:
        for plane in _planes(layer):
            plane.fill_(255)
        if layer.c128_state is not None:
            layer.c128_state.fill_(torch.nan)
    assert len(ids) <= pages_each * PAGE_TOKENS
    table = torch.randperm(num_slots * pages_each, generator=torch.Generator().manual_seed(num_slots))
    page_table = table.int().view(num_slots, pages_each).to(device)
    slot, done, logits = num_slots - 1, num_held, []
    starts = [0] * slot + [done]
    own = list(_held(pools, slot, page_table[slot]))
    for (plane, index), values in zip(own, held or (), strict=held is not None):
        plane[index] = values.to(device)
    for number, (count, others) in enumerate(steps):
        counts = [*others, *[0] * (slot - len(others)), count]
        for other, taken in enumerate(counts[:-1]):
            if starts[other] + taken > pages_each * PAGE_TOKENS:
                starts[other] = 0
        used = [each for each, taken in enumerate(counts) if taken]
        arrays = (used, [starts[each] for each in used], [counts[each] for each in used])
        tokens = [token % vocab for token in random_ids(network.config, sum(counts) - count, 100 + number)]
        tokens += ids[done : done + count]
        num_rows = bucket_of(len(tokens))
        rows = Rows.build(*(torch.tensor(array, dtype=torch.int32, device=device) for array in arrays), num_rows)
        step = PagedDeviceStep(pools, rows, page_table, fits_rings=max(counts) == 1)
        padded = torch.tensor(tokens + [0] * (num_rows - len(tokens)), device=device)
        logits.append(network.logits(network(padded, step)[: len(tokens)])[len(tokens) - count :])
        done += count
        starts = [start + taken for start, taken in zip(starts, counts, strict=True)]
    assert done == len(ids)
    found = [torch.cat(logits), *(plane[index] for plane, index in own)]
    return [tensor.contiguous().view(torch.uint8).cpu() for tensor in found]


def _held(pools: CachePools, slot: int, pages: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Planes of the cache, and which of their rows belong to a slot with these pages."""
    for layer in pools.layers:
        yield from _held_of_layer(layer, pools.layout, slot, pages.long())


def _held_of_layer(layer: LayerCache, layout: CacheLayout, slot: int, pages: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rings = ((layer.window, layout.window_ring_rows), (layer.c4_state, layout.c4_ring_rows),
             (layer.index_state, layout.c4_ring_rows))  # fmt: skip
    for planes, ring_rows in rings:
        for plane in planes or ():
            yield plane, slot * ring_rows + torch.arange(ring_rows, device=plane.device)
    for planes in (layer.entries, layer.index):
        for plane in planes or ():
            per_page = PAGE_TOKENS // layer.layout.ratio
            yield plane, (pages.unsqueeze(1) * per_page + torch.arange(per_page, device=plane.device)).flatten()
    if layer.c128_state is not None:
        yield layer.c128_state, torch.tensor([slot], device=pages.device)


def among(chunks: list[int], num_decodes: int, num_others: int, other_chunk: int = 5) -> list[Step]:
    """Chunks of a prompt, then decodes, among so many other requests that decode; one of these has a chunk of
    `other_chunk` tokens in every second step."""
    others = [1] * num_others
    mixed = [other_chunk, *others[1:]] if others else others
    return [(count, (others, mixed)[number % 2]) for number, count in enumerate(chunks + [1] * num_decodes)]


def differences(found: list[Tensor], expected: list[Tensor]) -> list[int]:
    """Of each tensor, how many bytes differ."""
    return [int((one != other).sum()) for one, other in zip(found, expected, strict=True)]
