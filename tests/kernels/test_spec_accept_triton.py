"""Acceptance by Triton's interpreter against the reference over `distribution`."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.poison import poisoned  # noqa: F401
from support.statistics import fits

from dsv4_kernels.arrival import counters
from dsv4_kernels.sampling import distribution
from dsv4_kernels.sampling.triton import sample
from dsv4_kernels.spec_accept import accept_drafts, match_drafts, triton
from dsv4_kernels.spec_accept.triton import accept

SETTINGS = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 9, 0.9, 0.05)]


def settings_of(rows, width, first=0):
    """Of `rows` requests, repeated for `width` rows of each; `first` is the place in SETTINGS of the first one."""
    columns = zip(*(SETTINGS[row % len(SETTINGS)] for row in range(first, first + rows)), strict=True)
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32)
    values = [torch.tensor(c, dtype=d).repeat_interleave(width) for c, d in zip(columns, dtypes, strict=True)]
    return dict(zip(("temperature", "top_k", "top_p", "min_p"), values, strict=True))


def lasts_of(logits, first):
    rows, width, vocab = logits.shape
    ones = torch.ones(rows * width, dtype=torch.float64)
    return sample(logits.view(-1, vocab), **settings_of(rows, width, first), uniform=ones)[0].view(rows, width)


def judge(target, proposal, drafts, coins, draws, first=0):
    own = settings_of(len(drafts), 1, first)
    is_filtered = ((own["top_k"] > 0) | (own["top_p"] < 1) | (own["min_p"] > 0)).to(torch.uint8)
    return accept(
        target, lasts_of(target, first), proposal, lasts_of(proposal, first), drafts,
        temperature=own["temperature"], is_filtered=is_filtered, coins=coins, draws=draws,
    )  # fmt: skip


def inputs(seed, rows, k, vocab):
    random = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, k + 1, vocab, generator=random) * 2
    proposal = target[:, :k] + torch.randn(rows, k, vocab, generator=random) * 0.7
    drafts = proposal.argmax(-1)
    counts = torch.randint(0, k + 1, (rows, 1), generator=random)
    drafts = drafts.masked_fill(torch.arange(k) >= counts, -1)
    coins = torch.rand(rows, k, generator=random, dtype=torch.float64)
    return target, proposal, drafts, coins, torch.rand(rows, k + 1, generator=random, dtype=torch.float64)


@pytest.mark.parametrize(("k", "vocab"), [(1, 37), (3, 160), (2, 5000)])
def test_requests_get_what_the_reference_gives_them(k, vocab):
    rows = 20
    target, proposal, drafts, coins, draws = inputs(k, rows, k, vocab)
    found = judge(target, proposal, drafts, coins, draws)
    p = distribution(target.view(-1, vocab), **settings_of(rows, k + 1)).view_as(target)
    q = distribution(proposal.reshape(-1, vocab), **settings_of(rows, k)).view_as(proposal)
    expected = accept_drafts(p, q, drafts, coins, draws)
    greedy = match_drafts(target.argmax(-1), drafts)
    is_greedy = settings_of(rows, 1)["temperature"] == 0
    for one, sampled, matched in zip(found, expected, greedy, strict=True):
        assert torch.equal(one, torch.where(is_greedy, matched, sampled))
    assert len(set(found[0].tolist())) > 1


def test_a_request_has_the_same_result_alone(monkeypatch):
    """Also where the requests of a batch get fewer programs each."""
    monkeypatch.setattr(triton, "TURN", 128)
    monkeypatch.setattr(triton, "PROGRAMS", 60)
    given = inputs(7, 10, 2, 400)
    found = judge(*given)
    for row in range(10):
        alone = judge(*(value[row : row + 1].contiguous() for value in given), first=row)
        assert [value[row] for value in found] == [value[0] for value in alone]


def test_tokens_have_the_law_of_the_target():
    """One draft of five tokens, drawn from another law; the first token of each round is counted."""
    rounds, vocab = 500, 5
    random = torch.Generator().manual_seed(3)
    target = torch.randn(1, 2, vocab, generator=random).expand(rounds, -1, -1).contiguous()
    proposal = torch.randn(1, 1, vocab, generator=random).expand(rounds, -1, -1).contiguous()
    drafts = torch.multinomial(proposal[0, 0].softmax(-1), rounds, replacement=True, generator=random).unsqueeze(1)
    coins, draws = (torch.rand(rounds, n, generator=random, dtype=torch.float64) for n in (1, 2))
    lasts = [torch.zeros(rounds, n, dtype=torch.int64) for n in (2, 1)]
    num, token = accept(
        target, lasts[0], proposal, lasts[1], drafts, temperature=torch.ones(rounds),
        is_filtered=torch.zeros(rounds, dtype=torch.uint8), coins=coins, draws=draws,
    )  # fmt: skip
    first = torch.where(num > 0, drafts[:, 0], token)
    assert 0 < int(num.sum()) < rounds
    assert fits(first.bincount(minlength=vocab).tolist(), target[0, 0].softmax(-1).tolist())


@pytest.mark.usefixtures("poisoned")
def test_nothing_is_read_that_was_not_written_and_the_counters_are_zero_again():
    given = inputs(9, 5, 2, 2500)
    found = judge(*given)
    assert not counters(given[0].device, 25).any()
    assert [value.tolist() for value in judge(*given)] == [value.tolist() for value in found]
    assert ((found[1] >= 0) & (found[1] < 2500)).all()


def test_no_requests():
    none, ids = torch.empty(0, 2, 9), torch.empty(0, 1, dtype=torch.int64)
    found = accept(
        none, torch.empty(0, 2, dtype=torch.int64), none[:, :1], ids, ids, temperature=torch.empty(0),
        is_filtered=torch.empty(0, dtype=torch.uint8), coins=torch.empty(0, 1, dtype=torch.float64),
        draws=torch.empty(0, 2, dtype=torch.float64),
    )  # fmt: skip
    assert [len(value) for value in found] == [0, 0]
