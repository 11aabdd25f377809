"""Log probabilities, penalties, bias and bans against literal restatements, one number at a time."""

import math

import torch

from dsv4_kernels.sampling import add_bias, ban, penalise, token_logprobs


def random(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_logprobs_are_the_logarithm_of_softmax_and_the_best_come_first():
    logits = random(5, 300)
    chosen, top_ids, top = token_logprobs(logits, torch.tensor([0, 1, 2, 299, 7]), 20)
    for row, values in enumerate(logits.double().tolist()):
        total = math.log(sum(math.exp(value) for value in values))
        assert math.isclose(chosen[row], values[[0, 1, 2, 299, 7][row]] - total, abs_tol=1e-5)
        order = sorted(range(300), key=lambda token: (-values[token], token))[:20]
        assert top_ids[row].tolist() == order
        expected = torch.tensor([values[token] - total for token in order])
        assert torch.allclose(top[row], expected, atol=1e-5)


def test_logprobs_of_the_whole_vocabulary_are_right_to_the_last_places():
    logits = random(2, 129_280, seed=8, scale=4.0)
    tokens = torch.tensor([7, 129_279])
    chosen, _, _ = token_logprobs(logits, tokens, 0)
    for row, values in enumerate(logits.double().tolist()):
        expected = values[tokens[row]] - math.log(math.fsum(math.exp(value) for value in values))
        assert math.isclose(chosen[row], expected, rel_tol=2**-23)


def test_equal_logits_are_listed_by_id_and_none_may_be_asked_for():
    logits = torch.zeros(1, 50)
    _, top_ids, _ = token_logprobs(logits, torch.tensor([3]), 4)
    assert top_ids.tolist() == [[0, 1, 2, 3]]
    chosen, top_ids, top = token_logprobs(logits, torch.tensor([3]), 0)
    assert top_ids.shape == top.shape == (1, 0)
    assert math.isclose(chosen.item(), -math.log(50), rel_tol=1e-6)


def test_logprobs_of_a_row_do_not_depend_on_its_batch():
    logits, ids = random(9, 700, seed=1), torch.arange(9)
    together = token_logprobs(logits, ids, 5)
    for row in range(9):
        alone = token_logprobs(logits[row : row + 1], ids[row : row + 1], 5)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


def test_penalties_equal_the_literal_definition():
    logits = random(4, 40, seed=2)
    counts = torch.randint(0, 3, (4, 40), generator=torch.Generator().manual_seed(3))
    is_seen = (counts > 0) | (torch.rand(4, 40, generator=torch.Generator().manual_seed(4)) < 0.3)
    repetition, frequency, presence = [1.0, 1.3, 0.5, 2.0], [0.5, 0.0, -1.5, 2.0], [0.0, 0.7, 1.0, -2.0]
    rows, token_ids = is_seen.nonzero(as_tuple=True)
    got = logits.clone()
    penalise(
        got,
        rows=rows,
        token_ids=token_ids,
        counts=counts[rows, token_ids],
        repetition=torch.tensor(repetition)[rows],
        frequency=torch.tensor(frequency)[rows],
        presence=torch.tensor(presence)[rows],
    )
    for row in range(4):
        for token in range(40):
            value, count = logits[row, token].item(), counts[row, token].item()
            if is_seen[row, token]:
                value = value / repetition[row] if value > 0 else value * repetition[row]
            value -= frequency[row] * count + (presence[row] if count else 0.0)
            assert math.isclose(got[row, token].item(), value, rel_tol=1e-5, abs_tol=1e-5)


def test_the_smallest_repetition_penalty_keeps_logits_finite():
    logits = torch.tensor([[5.0, -5.0, 1.0]])
    penalise(
        logits,
        rows=torch.tensor([0, 0]),
        token_ids=torch.tensor([0, 1]),
        counts=torch.tensor([1, 1]),
        repetition=torch.tensor([1e-40, 1e-40]),
        frequency=torch.tensor([-2.0, -2.0]),
        presence=torch.tensor([-2.0, -2.0]),
    )
    assert torch.isfinite(logits).all()
    assert logits.argmax() == 0


def test_bias_and_bans_touch_only_the_places_named():
    logits = random(3, 10, seed=5)
    expected = logits.clone()
    expected[0, 4] += 2.5
    expected[2, 4] -= 100.0
    expected[2, 9] = torch.finfo(torch.float32).min
    add_bias(logits, torch.tensor([0, 2, 0]), torch.tensor([4, 4, 4]), torch.tensor([2.0, -100.0, 0.5]))
    ban(logits, torch.tensor([2]), torch.tensor([9]))
    assert torch.allclose(logits, expected)
