"""Indexer scores and selection, ties included."""

from __future__ import annotations

import ctypes

import pytest
import torch

from dsv4_kernels.indexer import index_scores, select, select_entries
from dsv4_kernels.indexer import reference as indexer_reference


def test_scores_are_the_weighted_sum_of_relus() -> None:
    generator = torch.Generator().manual_seed(0)
    q, w = torch.randn(2, 3, 4, 8, generator=generator), torch.randn(2, 3, 4, generator=generator)
    k = torch.randn(2, 5, 8, generator=generator)
    dots = torch.einsum("nthd,ned->nthe", q.double(), k.double())
    expected = (w.double().unsqueeze(-1) * dots.clamp_min(0)).sum(2)
    torch.testing.assert_close(index_scores(q, w, k).double(), expected, rtol=1e-5, atol=1e-5)


def test_bf16_scores_round_product_and_sum() -> None:
    """The official code holds dots, products and the sum in BF16."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 2, 4, 8, generator=generator).bfloat16()
    w, k = torch.randn(1, 2, 4, generator=generator).bfloat16(), torch.randn(1, 6, 8, generator=generator).bfloat16()
    dots = torch.einsum("nthd,ned->nthe", q.float(), k.float()).bfloat16()
    products = (dots.clamp_min(0).float() * w.float().unsqueeze(-1)).bfloat16()
    scores = index_scores(q, w, k)
    assert scores.dtype == torch.bfloat16
    assert torch.equal(scores, products.float().sum(2).bfloat16())


@pytest.mark.parametrize("seed", range(4))
def test_select_takes_the_best_and_the_lower_id_on_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, both signs and both zeros: ties everywhere.
    scores = torch.randint(-3, 4, (2, 9, 40), generator=generator).float() / 2
    scores[scores == 0] *= -1
    visible = torch.randint(0, 41, (2, 9), generator=generator)
    chosen = select(scores, visible, 8)
    for n in range(2):
        for row in range(9):
            ranked = sorted((-score, entry) for entry, score in enumerate(scores[n, row, : visible[n, row]].tolist()))
            found = sorted(entry for entry in chosen[n, row].tolist() if entry >= 0)
            assert found == sorted(entry for _, entry in ranked[:8])


def test_row_blocks_do_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    q, w = torch.randn(1, 20, 2, 4, generator=generator), torch.randn(1, 20, 2, generator=generator)
    k, visible = torch.randn(1, 30, 4, generator=generator), torch.arange(11, 31).unsqueeze(0)
    whole = select_entries(q, w, k, visible, 6).sort(-1).values
    monkeypatch.setattr(indexer_reference, "MAX_SCORE_ELEMENTS", 3 * 2 * 30)
    assert torch.equal(select_entries(q, w, k, visible, 6).sort(-1).values, whole)


def test_few_entries_are_all_chosen_without_scores() -> None:
    nan = torch.full((1, 3, 2, 4), torch.nan)
    chosen = select_entries(nan, nan[..., 0], torch.full((1, 5, 4), torch.nan), torch.tensor([[0, 2, 5]]), 8)
    assert chosen.tolist() == [[[-1] * 5, [0, 1, -1, -1, -1], [0, 1, 2, 3, 4]]]


class _Malloc(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


def test_new_shapes_leave_no_memory_behind():
    """oneDNN would keep half a MiB for each, and a server sees another number of entries in every step."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _Malloc

    def num_bytes() -> int:
        found = libc.mallinfo2()
        return found.uordblks + found.hblkhd

    def score(num_entries: int) -> None:
        q, k = torch.ones(1, 1, 4, 128, dtype=torch.bfloat16), torch.ones(1, num_entries, 128, dtype=torch.bfloat16)
        indexer_reference.index_scores(q, torch.ones(1, 1, 4, dtype=torch.bfloat16), k)

    score(300)
    before = num_bytes()
    for num_entries in range(301, 331):
        score(num_entries)
    assert num_bytes() - before < 2 << 20
