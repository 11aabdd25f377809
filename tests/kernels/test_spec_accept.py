"""Accepted drafts: the law of what comes out is the main model's, whatever the drafts were drawn from."""

from __future__ import annotations

import pytest
import torch
from support.statistics import fits

from dsv4_kernels.cases import SMALL
from dsv4_kernels.sampling import distribution, draw, sample
from dsv4_kernels.spec_accept import accept_drafts, match_drafts
from dsv4_kernels.spec_accept.cases import CASES, NUM_DRAFTS

VOCAB, LENGTH = 4, 3


def chain(seed: int, sharpness: float) -> torch.Tensor:
    """Random transition probabilities [V, V]; a row may have zeros."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCAB, VOCAB, generator=generator) * sharpness
    logits[0, 1] = -torch.inf
    return logits.softmax(-1)


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
@pytest.mark.parametrize(("seed", "sharpness"), [(0, 0.5), (1, 1.5), (2, 4.0)])
def test_sequences_have_the_law_of_the_target_whatever_the_proposal_is(
    num_drafts: int, seed: int, sharpness: float
) -> None:
    """A Markov chain drafted by another one. All sequences of three tokens are counted, whatever part of them was
    drafted; what a round does not reach is drawn from the target."""
    rounds = 100_000
    random = torch.Generator().manual_seed(100 + seed)
    target, proposal = chain(seed, sharpness), chain(seed + 50, sharpness)
    start = torch.zeros(rounds, dtype=torch.int64)

    def uniforms(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=random, dtype=torch.float64)

    states = [start]
    for _ in range(num_drafts):
        states.append(draw(proposal[states[-1]], uniforms(rounds)))
    drafts = torch.stack(states[1:], dim=1)
    num_own = torch.randint(0, num_drafts + 1, (rounds, 1), generator=random)  # requests with fewer drafts beside them
    drafts = drafts.masked_fill(torch.arange(num_drafts) >= num_own, -1)
    before = torch.stack(states, dim=1)
    num_accepted, token = accept_drafts(
        target[before],
        proposal[before[:, :-1]],
        drafts,
        uniforms(rounds, num_drafts),
        uniforms(rounds, num_drafts + 1),
    )
    assert bool((num_accepted <= num_own.squeeze(1)).all())
    sequence = torch.nn.functional.pad(drafts, (0, LENGTH + 1 - num_drafts), value=-1)
    sequence[torch.arange(rounds), num_accepted] = token
    for index in range(LENGTH):
        missing = index > num_accepted
        previous = start if index == 0 else sequence[:, index - 1]
        sequence[missing, index] = draw(target[previous[missing]], uniforms(int(missing.sum())))
    cells = sequence[:, 0] * VOCAB**2 + sequence[:, 1] * VOCAB + sequence[:, 2]
    law = target[0][:, None, None] * target[:, :, None] * target[None, :, :]
    assert fits(cells.bincount(minlength=VOCAB**3).tolist(), law.flatten().tolist())


@pytest.mark.parametrize("seed", range(3))
def test_a_draft_is_accepted_as_often_as_the_two_distributions_overlap(seed: int) -> None:
    rounds = 50_000
    random = torch.Generator().manual_seed(seed)
    p, q = (torch.rand(6, generator=random).softmax(0).pow(4) for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    drafts = draw(q.expand(rounds, -1), torch.rand(rounds, generator=random, dtype=torch.float64))
    num_accepted, _ = accept_drafts(
        p.expand(rounds, 2, -1),
        q.expand(rounds, 1, -1),
        drafts.unsqueeze(1),
        torch.rand(rounds, 1, generator=random, dtype=torch.float64),
        torch.rand(rounds, 2, generator=random, dtype=torch.float64),
    )
    overlap = torch.minimum(p, q).sum().item()
    assert fits(num_accepted.bincount(minlength=2).tolist(), [1 - overlap, overlap])


def test_equal_distributions_accept_everything() -> None:
    random = torch.Generator().manual_seed(5)
    probs = torch.rand(64, 3, 10, generator=random).softmax(-1)
    drafts = torch.randint(0, 10, (64, 2), generator=random)
    coins = torch.full((64, 2), 1 - 2**-53, dtype=torch.float64)
    draws = torch.rand(64, 3, generator=random, dtype=torch.float64)
    num_accepted, token = accept_drafts(probs, probs[:, :2], drafts, coins, draws)
    assert num_accepted.tolist() == [2] * 64
    assert token.tolist() == draw(probs[:, 2], draws[:, 2]).tolist()


def test_what_the_target_forbids_is_never_accepted_nor_drawn() -> None:
    target = torch.tensor([[[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]]).expand(100, -1, -1)
    proposal = torch.tensor([[[1.0, 0.0, 0.0]]]).expand(100, -1, -1)
    numbers = torch.linspace(0, 1 - 2**-53, 100, dtype=torch.float64)
    num_accepted, token = accept_drafts(
        target,
        proposal,
        torch.zeros(100, 1, dtype=torch.int64),
        torch.zeros(100, 1, dtype=torch.float64),
        numbers.unsqueeze(1).expand(-1, 2),
    )
    assert num_accepted.tolist() == [0] * 100
    assert set(token.tolist()) == {1, 2}


def test_greedy_drafts_are_accepted_up_to_the_first_that_is_not_the_best() -> None:
    best = torch.tensor([[5, 6, 7, 8]] * 5)
    drafts = torch.tensor([[5, 6, 7], [5, 6, 9], [4, 6, 7], [5, -1, -1], [-1, -1, -1]])
    num_accepted, token = match_drafts(best, drafts)
    assert num_accepted.tolist() == [3, 2, 0, 1, 0]
    assert token.tolist() == [8, 7, 5, 6, 5]


@pytest.mark.parametrize("case", [case for case in CASES if case.name in SMALL], ids=lambda case: case.name)
def test_a_row_does_not_depend_on_the_rows_beside_it_and_inputs_are_not_written(case) -> None:
    inputs = case.make(3)
    before = {name: value.clone() for name, value in inputs.items()}
    num_accepted, token = accept_drafts(**inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    assert len(num_accepted) == len(token) == case.num_tokens
    for row in range(case.num_tokens):
        alone = accept_drafts(**{name: value[row : row + 1] for name, value in inputs.items()})
        assert (alone[0].item(), alone[1].item()) == (num_accepted[row].item(), token[row].item())
        assert 0 <= num_accepted[row] <= (inputs["drafts"][row] >= 0).sum() <= NUM_DRAFTS


SETTINGS = [(1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (0.5, 3, 0.9, 0.1), (0.0, 0, 1.0, 0.0)]


def test_the_distribution_is_what_sample_draws_from() -> None:
    """Every number of a fine grid through `sample`, against the probabilities; rows have different filters."""
    logits = torch.randn(len(SETTINGS), 12, generator=torch.Generator().manual_seed(1)) * 2
    columns = [torch.tensor(column) for column in zip(*SETTINGS, strict=True)]
    settings = dict(zip(("temperature", "top_k", "top_p", "min_p"), columns, strict=True))
    probs = distribution(logits, **settings)
    assert probs.sum(-1).tolist() == pytest.approx([1.0] * len(SETTINGS))
    grid = 4000
    counts = torch.zeros_like(probs)
    for index in range(grid):
        u = torch.full((len(SETTINGS),), (index + 0.5) / grid, dtype=torch.float64)
        counts[torch.arange(len(SETTINGS)), sample(logits, uniform=u, **settings)] += 1
    assert (counts / grid - probs).abs().max() < 2 / grid
    assert torch.equal(counts > 0, probs > 1 / grid)
    for row in range(len(SETTINGS)):
        alone = distribution(logits[row : row + 1], **{name: value[row : row + 1] for name, value in settings.items()})
        assert torch.equal(alone[0], probs[row])
