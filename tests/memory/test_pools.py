"""Slots never show what was there before; tails bring back exactly what was."""

from __future__ import annotations

import torch
from support.models import small_config

from dsv4serve.config import Numerics
from dsv4serve.memory import CacheLayout, CachePools


def make_pools(num_draft_tokens: int = 0) -> CachePools:
    layout = CacheLayout.build(small_config(), Numerics.EXACT, num_draft_tokens)
    return CachePools(layout, num_slots=3, num_pages=4, num_tails=2)


def slot_bytes(pools: CachePools, slot: int) -> list[torch.Tensor]:
    rings = [
        plane.view(pools.num_slots + 1, -1, plane.shape[1])[slot] for layer in pools.layers for plane in layer.rings()
    ]
    return [*rings, pools.streams[slot]]


def poison(pools: CachePools, slot: int, value: int) -> None:
    for plane in slot_bytes(pools, slot):
        plane.fill_(value)
    for layer in pools.layers:
        if layer.c128_state is not None:
            layer.c128_state[slot].fill_(torch.nan)


def test_allocated_bytes_are_the_planned_ones() -> None:
    for drafts in (0, 2):
        pools = make_pools(drafts)
        layout = pools.layout
        assert sum(plane.numel() for plane in slot_bytes(pools, 0)) == layout.ring_bytes
        pages = [plane for layer in pools.layers for planes in (layer.entries, layer.index) for plane in planes or ()]
        assert sum(plane.numel() for plane in pages) == layout.page_bytes * (pools.num_pages + 1)


def test_init_clears_one_slot_only() -> None:
    pools = make_pools()
    poison(pools, 0, 255)
    poison(pools, 1, 7)
    pools.init_slot(0)
    assert all((plane == 0).all() for plane in slot_bytes(pools, 0))
    assert all((layer.c128_state[0] == 0).all() for layer in pools.layers if layer.c128_state is not None)
    assert all((plane == 7).all() for plane in slot_bytes(pools, 1))


def test_commit_takes_the_c128_state_behind_the_last_accepted_draft() -> None:
    pools = make_pools(num_draft_tokens=3)
    states = [layer.c128_state for layer in pools.layers if layer.c128_state is not None]
    assert states
    for index, state in enumerate(states):
        state.normal_(generator=torch.Generator().manual_seed(index))
    before = [state.clone() for state in states]
    pools.commit(torch.tensor([2, 0]), torch.tensor([3, 1]))
    for state, old in zip(states, before, strict=True):
        assert torch.equal(state[2, 0], old[2, 3])
        assert torch.equal(state[0, 0], old[0, 1])
        old[2, 0], old[0, 0] = old[2, 3], old[0, 1]
        assert torch.equal(state, old)


def test_streams_come_back_as_they_were() -> None:
    pools = make_pools(num_draft_tokens=1)
    config = small_config()
    streams = torch.randn(2, config.hc_mult, config.hidden_size)
    pools.store_streams(torch.tensor([2, 0]), streams)
    assert torch.equal(pools.load_streams(torch.tensor([0, 2]), config.hc_mult, torch.float32), streams.flip(0))


def test_restore_brings_back_the_snapshot_and_clears_the_c128_state() -> None:
    pools = make_pools(num_draft_tokens=1)
    for index, plane in enumerate(slot_bytes(pools, 2)):
        plane.random_(0, 256, generator=torch.Generator().manual_seed(index))
    saved = [plane.clone() for plane in slot_bytes(pools, 2)]
    pools.snapshot(2, 1)
    poison(pools, 2, 255)
    poison(pools, 0, 255)
    pools.restore(1, 0)
    assert all(torch.equal(plane, old) for plane, old in zip(slot_bytes(pools, 0), saved, strict=True))
    assert all((layer.c128_state[0] == 0).all() for layer in pools.layers if layer.c128_state is not None)
