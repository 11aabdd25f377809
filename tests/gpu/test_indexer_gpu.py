"""The indexer on a GPU against the reference, at the shapes of the released models and of the demo."""

import pytest
import torch

from dsv4_kernels.indexer import reference, triton
from dsv4_kernels.indexer.cases import (
    CASES,
    DEMO_HEADS,
    DEMO_TOP_K,
    FLASH_TOP_K,
    HEADS,
    PRO_TOP_K,
    Case,
    Queries,
    row_scores,
)
from dsv4_kernels.indexer.queries import prepare_queries
from dsv4_kernels.kv_store.triton import prepare_q

STEP = 2.0**-7  # of bfloat16, relative: what a sum over heads in another order may change in a score
FLIPPED = 2e-3  # share of query elements where RoPE in other float32 arithmetic may decide a rounding
MODELS = [(HEADS, PRO_TOP_K), (HEADS, FLASH_TOP_K), (DEMO_HEADS, DEMO_TOP_K)]
LONG = [
    Case("chunk", (6000, 9000), (300, 5), num_padding=3),
    Case("64K", (65535, 40000, 3), (1, 4, 1)),
    Case("1M", ((1 << 20) - 2,), (2,)),
]


def by_reference(scores, top_k):
    if len(scores) <= top_k:
        return torch.arange(len(scores))
    return reference.select(scores[None, None], torch.tensor([[len(scores)]]), top_k).flatten()


def rows_to_check(case):
    return range(0, sum(case.counts), max(1, sum(case.counts) // 12))


@pytest.mark.parametrize(("num_heads", "top_k"), MODELS)
@pytest.mark.parametrize("case", [*CASES, *LONG], ids=lambda case: case.name)
def test_the_choice_is_exact_where_scores_are(case, num_heads, top_k):
    """Small integers: no sum rounds, and many scores are equal, so the lower id has to win."""
    arguments = case.make(num_heads, top_k, 2, device="cuda", whole_numbers=True)
    chosen = triton.select(**arguments).cpu()
    for row in rows_to_check(case):
        expected = by_reference(row_scores(arguments, row).cpu(), top_k).sort().values.tolist()
        assert chosen[row].tolist() == expected + [-1] * (top_k - len(expected))


@pytest.mark.parametrize(("num_heads", "top_k"), MODELS)
@pytest.mark.parametrize("case", [*CASES, *LONG], ids=lambda case: case.name)
def test_other_scores_decide_as_the_reference_but_for_one_step_at_the_threshold(case, num_heads, top_k):
    arguments = case.make(num_heads, top_k, 3, device="cuda")
    chosen = triton.select(**arguments).cpu()
    for row in rows_to_check(case):
        scores = row_scores(arguments, row).cpu().float()
        expected = by_reference(scores, top_k)
        found = chosen[row][chosen[row] >= 0].long()
        assert len(found) == len(expected)
        assert (found.diff() > 0).all()
        differs = torch.zeros(len(scores), dtype=torch.int32)
        differs[expected] += 1
        differs[found] -= 1
        if len(expected):
            threshold = scores[expected].min()
            assert ((scores[differs != 0] - threshold).abs() <= STEP * threshold.abs()).all()


def test_rows_that_take_turns_choose_alike(monkeypatch):
    arguments = LONG[0].make(HEADS, PRO_TOP_K, 4, device="cuda")
    whole = triton.select(**arguments)
    monkeypatch.setattr(triton, "MAX_SCORE_BYTES", 100 << 10)
    assert torch.equal(triton.select(**arguments)[:305], whole[:305])


@pytest.mark.parametrize(("num_heads", "num_index_heads", "head_dim"), [(128, HEADS, 512), (8, DEMO_HEADS, 128)])
@pytest.mark.parametrize("num_tokens", [1, 77, 300])
def test_queries_of_both_kinds_are_what_the_model_makes_of_them(num_heads, num_index_heads, head_dim, num_tokens):
    case = Case("queries", (70000,), (num_tokens,), num_padding=3)
    rows = case.make(num_index_heads, DEMO_TOP_K, 5, device="cuda")["rows"]
    queries = Queries(rows, num_heads, num_index_heads, head_dim)
    arguments = queries.make(6)
    heads, expected, expected_weights = queries.split(arguments)
    alone = prepare_q(heads.clone(), arguments["eps"], arguments["rotations"], rows)
    before = arguments["queries"].clone()
    q, index_q, weights = prepare_queries(**arguments)
    assert torch.equal(q[:num_tokens], alone[:num_tokens])
    assert torch.equal(arguments["queries"][num_tokens:], before[num_tokens:])
    assert (index_q != expected)[:num_tokens].sum() <= FLIPPED * expected.numel()
    assert torch.equal(weights[:num_tokens], expected_weights[:num_tokens])
