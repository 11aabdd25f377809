"""Judging drafts on a GPU against the reference on the CPU, at the released vocabulary."""

import pytest
import torch

from dsv4_kernels.arrival import counters
from dsv4_kernels.sampling import distribution
from dsv4_kernels.sampling.triton import sample
from dsv4_kernels.spec_accept import accept_drafts, match_drafts
from dsv4_kernels.spec_accept.triton import accept

VOCAB = 129_280
SETTINGS = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 50, 1.0, 0.0), (1.0, 0, 0.95, 0.0), (1.0, 90, 0.9, 0.05)]


def settings_of(requests, width):
    """All settings in turn, repeated for `width` rows of each request, on the CPU."""
    columns = zip(*(SETTINGS[request % len(SETTINGS)] for request in range(requests)), strict=True)
    names = ("temperature", "top_k", "top_p", "min_p")
    return {name: torch.tensor(c).repeat_interleave(width) for name, c in zip(names, columns, strict=True)}


def on_gpu(values):
    return {name: value.cuda() for name, value in values.items()}


def judge(target, proposal, drafts, coins, draws):
    """All on the GPU, from the CPU."""
    requests = len(drafts)
    lasts = []
    for logits in (target.cuda(), proposal.cuda()):
        rows = logits.flatten(0, 1)
        ones = torch.ones(len(rows), dtype=torch.float64, device="cuda")
        drawn, _ = sample(rows, **on_gpu(settings_of(requests, logits.shape[1])), uniform=ones)
        lasts += [logits, drawn.view(requests, -1)]
    own = settings_of(requests, 1)
    is_filtered = (own["top_k"] > 0) | (own["top_p"] < 1) | (own["min_p"] > 0)
    return accept(
        *lasts, drafts.cuda(), temperature=own["temperature"].cuda(), is_filtered=is_filtered.to(torch.uint8).cuda(),
        coins=coins.cuda(), draws=draws.cuda(),
    )  # fmt: skip


@pytest.mark.parametrize(("requests", "k", "deviation"), [(1, 1, 4.0), (10, 3, 3.0), (25, 2, 2.5)])
def test_requests_get_what_the_reference_gives_them_in_each_of_many_launches(requests, k, deviation):
    random = torch.Generator().manual_seed(requests)
    target = torch.randn(requests, k + 1, VOCAB, generator=random) * deviation
    proposal = target[:, :k] + torch.randn(requests, k, VOCAB, generator=random) * 0.3
    drafts = proposal.argmax(-1)
    coins = torch.rand(requests, k, generator=random, dtype=torch.float64)
    draws = torch.rand(requests, k + 1, generator=random, dtype=torch.float64)
    p = distribution(target.flatten(0, 1), **settings_of(requests, k + 1)).view_as(target)
    q = distribution(proposal.flatten(0, 1), **settings_of(requests, k)).view_as(proposal)
    sampled = accept_drafts(p, q, drafts, coins, draws)
    greedy = match_drafts(target.argmax(-1), drafts)
    is_greedy = settings_of(requests, 1)["temperature"] == 0
    for _ in range(10):
        found = judge(target, proposal, drafts, coins, draws)
        for one, other, matched in zip(found, sampled, greedy, strict=True):
            assert torch.equal(one.cpu(), torch.where(is_greedy, matched, other))
    assert not counters(torch.device("cuda", 0), requests * (2 * k + 1)).any()
