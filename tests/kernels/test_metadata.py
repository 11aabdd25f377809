"""Every table of a step equals a literal walk over its tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4_kernels.metadata import C4, C128, Rows, StepMetadata

PAGE = 256


def make_step(seed: int, decode_only: bool) -> tuple[StepMetadata, list[int], list[int], list[int], np.ndarray]:
    draw = np.random.default_rng(seed)
    num_requests = int(draw.integers(1, 6))
    slots = draw.permutation(9)[:num_requests].tolist()
    starts = draw.integers(0, 700, num_requests).tolist()
    counts = [1] * num_requests if decode_only else draw.choice([1, 1, 2, 7, 130, 300], num_requests).tolist()
    pages = draw.permutation(64)[: num_requests * 4].reshape(num_requests, 4).astype(np.int64)
    return StepMetadata(slots, starts, counts, pages, PAGE), slots, starts, counts, pages


CASES = [(seed, decode_only) for seed in range(6) for decode_only in (False, True)]


@pytest.mark.parametrize(("seed", "decode_only"), CASES)
def test_positions_and_groups_cover_every_row(seed: int, decode_only: bool) -> None:
    step, _, starts, counts, _ = make_step(seed, decode_only)
    expected = [start + offset for start, count in zip(starts, counts, strict=True) for offset in range(count)]
    assert step.positions.tolist() == expected
    covered = [
        (group.first_row + index * group.num_rows, group.num_rows)
        for group in step.groups
        for index in range(group.num_requests)
    ]
    first_rows = np.cumsum([0, *counts[:-1]]).tolist()
    assert covered == list(zip(first_rows, counts, strict=True))


@pytest.mark.parametrize(("seed", "decode_only"), CASES)
@pytest.mark.parametrize(("ring_rows", "width"), [(128, 128), (131, 128), (16, 16)])
def test_window_reads_the_rows_of_its_positions(seed: int, decode_only: bool, ring_rows: int, width: int) -> None:
    """Simulate the ring as 'which position does a row hold' and check every cell of the table."""
    step, slots, starts, counts, _ = make_step(seed, decode_only)
    ring = {}
    for slot, start in zip(slots, starts, strict=True):
        for position in range(max(0, start - ring_rows), start):
            ring[slot * ring_rows + position % ring_rows] = position
    rows, target = step.commit(ring_rows)
    history = step.window(ring_rows, width)
    positions = step.positions.tolist()
    if not history.local:
        for row, where in zip(rows.tolist(), target.tolist(), strict=True):
            ring[where] = positions[row]
    row = 0
    for request, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        for _ in range(count):
            for column, cell in enumerate(history.table[row].tolist()):
                wanted = positions[row] - width + 1 + column
                if wanted < 0:
                    assert cell == -1
                elif not history.local:
                    assert cell // ring_rows == slot
                    assert ring[cell] == wanted
                elif cell < len(slots) * ring_rows:
                    assert cell // ring_rows == request
                    assert ring[slot * ring_rows + cell % ring_rows] == wanted
                else:
                    assert positions[cell - len(slots) * ring_rows] == wanted
            row += 1
    assert len(set(target.tolist())) == len(target), "two rows of one step are committed to the same ring row"


@pytest.mark.parametrize(("seed", "decode_only"), CASES)
def test_compressed_entries_are_closed_and_visible_at_their_last_token(seed: int, decode_only: bool) -> None:
    step, _, starts, counts, pages = make_step(seed, decode_only)
    closed = {C4: [], C128: []}
    visible = {C4: [], C128: []}
    for request, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for position in range(start, start + count):
            for ratio in (C4, C128):
                per_page = PAGE // ratio
                rows = [
                    int(pages[request, entry // per_page]) * per_page + entry % per_page
                    for entry in range((position + 1) // ratio)
                ]
                visible[ratio].append(rows)
                if (position + 1) % ratio == 0:
                    closed[ratio].append((rows[-1], position // ratio))
    c4 = step.c4_closings
    found = [] if c4 is None else list(zip(c4.entry_rows.tolist(), c4.entry_ids.tolist(), strict=True))
    assert found == closed[C4]
    segments = step.c128_segments
    assert list(zip(segments.entry_rows.tolist(), segments.entry_ids.tolist(), strict=True)) == closed[C128]
    for row, rows in enumerate(visible[C128]):
        cells = step.all_entries(C128)[row].tolist()
        assert cells == rows + [-1] * (len(cells) - len(rows))
    assert step.num_visible_c4.tolist() == [len(rows) for rows in visible[C4]]
    chosen = torch.tensor([[len(rows) - 1, -1, 0 if rows else -1] for rows in visible[C4]])
    expected = [[rows[-1] if rows else -1, -1, rows[0] if rows else -1] for rows in visible[C4]]
    assert step.c4_table(chosen).tolist() == expected


@pytest.mark.parametrize(("seed", "decode_only"), CASES)
def test_c128_segments_partition_the_step(seed: int, decode_only: bool) -> None:
    step, slots, _, counts, _ = make_step(seed, decode_only)
    segments = step.c128_segments
    positions = step.positions.tolist()
    owners = [slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
    seen = []
    for index, cells in enumerate(segments.rows.tolist()):
        rows = [cell for cell in cells if cell >= 0]
        seen += rows
        assert {owners[row] for row in rows} == {segments.sources[index].item()} == {segments.targets[index].item()}
        assert len({positions[row] // C128 for row in rows}) == 1
        assert segments.fresh[index].item() == (positions[rows[0]] % C128 == 0)
        closes = positions[rows[-1]] % C128 == C128 - 1
        assert (index in segments.closing.tolist()) == closes
        assert (index in segments.open.tolist()) != closes
    assert seen == list(range(step.num_rows))


@pytest.mark.parametrize("seed", range(12))
def test_each_row_that_a_draft_may_follow_leaves_its_own_c128_state(seed: int) -> None:
    """Segment by segment: what it reads, where it ends, which bank of which slot it writes."""
    draw = np.random.default_rng(seed)
    banks = 5
    slots, drafts = [6, 2, 4, 0], draw.integers(0, banks, 4).tolist()
    counts = [1 + num if num else int(draw.choice([1, 140])) for num in drafts]
    starts = (draw.integers(0, 3, 4) * C128 + draw.integers(122, 130, 4)).tolist()
    pages = np.arange(16).reshape(4, 4)
    step = StepMetadata(slots, starts, counts, pages, PAGE, drafts=drafts, c128_banks=banks)
    expected, first = [], 0
    for slot, start, count, num_drafts in zip(slots, starts, counts, drafts, strict=True):
        begin = 0
        for offset in range(count):
            if (start + offset) % C128 == 0:
                begin = offset
            closes = (start + offset + 1) % C128 == 0
            if num_drafts or closes or offset == count - 1:
                rows = list(range(first + begin, first + offset + 1))
                bank = offset if num_drafts else 0
                expected.append((rows, slot * banks, slot * banks + bank, (start + begin) % C128 == 0, closes))
        first += count
    segments = step.c128_segments
    closing = segments.closing.tolist()
    found = [
        ([cell for cell in cells if cell >= 0], source, target, fresh, index in closing)
        for index, (cells, source, target, fresh) in enumerate(
            zip(
                segments.rows.tolist(),
                segments.sources.tolist(),
                segments.targets.tolist(),
                segments.fresh.tolist(),
                strict=True,
            )
        )
    ]
    assert found == expected
    assert sorted(closing + segments.open.tolist()) == list(range(len(found)))


def test_rows_of_a_step_know_their_request_and_padding_is_marked():
    slots, starts, counts = (torch.tensor(values, dtype=torch.int32) for values in ([7, 2, 5], [130, 9, 0], [1, 0, 3]))
    rows = Rows.build(slots, starts, counts, num_rows=6)
    assert rows.slots.tolist() == [7, 5, 5, 5, -1, -1]
    assert rows.positions.tolist() == [130, 0, 1, 2, -1, -1]
    assert rows.firsts.tolist() == [0, 1, 1, 1, -1, -1]
    assert rows.counts.tolist() == [1, 3, 3, 3, 0, 0]
    assert all(values.dtype == torch.int32 for values in vars(rows).values())
