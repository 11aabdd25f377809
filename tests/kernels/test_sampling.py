"""Sampling: filters against a literal restatement, statistics of the draw and of the counter-based numbers."""

import pytest
import torch

from dsv4_kernels.sampling import COIN, DRAFT, NonFiniteLogits, sample, signed, uniform, uniforms


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, u=0.5):
    """`sample` with one number for all rows, or one each."""
    rows = logits.shape[0]

    def each(value, dtype):
        return torch.as_tensor(value, dtype=dtype).expand(rows).clone()

    return sample(
        logits,
        temperature=each(temperature, torch.float32),
        top_k=each(top_k, torch.int64),
        top_p=each(top_p, torch.float32),
        min_p=each(min_p, torch.float32),
        uniform=each(u, torch.float64),
    )


def literal(logits, temperature, top_k, top_p, min_p, u):
    """One row by plain Python: sort, cut three times, walk the cumulative sum."""
    scores = [value / temperature for value in logits.double().tolist()]
    largest = max(scores)
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    kept = [(token, float(torch.tensor(scores[token] - largest, dtype=torch.float64).exp())) for token in order]
    kept = kept[: top_k or None]
    mass, before, nucleus = sum(p for _, p in kept), 0.0, []
    for token, probability in kept:
        if nucleus and top_p < 1 and before >= top_p * mass:
            break
        nucleus.append((token, probability))
        before += probability
    kept = [pair for pair in nucleus if pair[1] >= min_p]
    if not 0 < top_k < len(scores) and top_p >= 1 and min_p <= 0:
        kept.sort()  # nothing is cut: the order of ids
    target = u * sum(p for _, p in kept)
    before = 0.0
    for token, probability in kept:
        before += probability
        if before > target:
            return token
    return kept[-1][0]


SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (0.5, 0, 1.0, 0.1),
    (1.0, 40, 0.8, 0.05),
    (2.0, 300, 0.99, 0.0),
    (1.0, 1, 1.0, 0.0),
    (3.0, 0, 0.999, 0.0),
    (5.0, 0, 1.0, 0.0),
    (1.0, 0, 1e-6, 1.0),
    (5.0, 280, 1.0, 0.0),
]


@pytest.mark.parametrize("vocab", [1, 7, 257, 700])
def test_equals_the_literal_definition(vocab):
    random = torch.Generator().manual_seed(vocab)
    numbers = torch.rand(16, generator=random, dtype=torch.float64)
    logits = torch.randn(16, vocab, generator=random) * 3
    for temperature, top_k, top_p, min_p in SETTINGS:
        got = draw(logits, temperature, top_k, top_p, min_p, numbers)
        expected = [
            literal(row, temperature, top_k, top_p, min_p, u) for row, u in zip(logits, numbers.tolist(), strict=True)
        ]
        assert got.tolist() == expected, (temperature, top_k, top_p, min_p)


def test_a_row_does_not_depend_on_its_batch():
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(33, 600, generator=random) * torch.linspace(0.1, 6, 33).unsqueeze(1)
    settings = {
        "temperature": torch.tensor([0.0, 0.3, 1.0] * 11),
        "top_k": torch.randint(0, 50, (33,), generator=random),
        "top_p": torch.rand(33, generator=random) * 0.5 + 0.5,
        "min_p": torch.rand(33, generator=random) * 0.1,
        "uniform": torch.rand(33, generator=random, dtype=torch.float64),
    }
    for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        settings[name][::4] = off  # rows without filters beside rows with some
    together = sample(logits, **settings)
    alone = [sample(logits[i : i + 1], **{k: v[i : i + 1] for k, v in settings.items()}).item() for i in range(33)]
    assert together.tolist() == alone


def test_greedy_takes_the_lowest_id_of_equal_maxima():
    logits = torch.zeros(2, 50)
    logits[:, [7, 30]] = 2.0
    assert draw(logits, temperature=0.0).tolist() == [7, 7]
    assert draw(logits, temperature=[0.0, 1.0], top_k=1).tolist() == [7, 7]


def test_equal_logits_are_ordered_by_id():
    logits = torch.zeros(4, 400)
    logits[:, ::2] = -0.0
    assert draw(logits, u=[0.0, 0.25, 0.5, 1 - 2**-53]).tolist() == [0, 100, 200, 399]


def test_tiny_and_huge_temperatures():
    logits = torch.tensor([[1.0, 3.0, 2.9]])
    assert draw(logits, temperature=1e-30, u=0.999).item() == 1
    assert draw(logits, temperature=1e30, u=0.999).item() == 2
    assert draw(logits, temperature=1e30, u=0.999, min_p=0.5).item() == 0


def test_masked_tokens_are_never_drawn():
    logits = torch.full((3, 300), -torch.inf)
    logits[:, [3, 250]] = 0.0
    assert draw(logits, u=[0.0, 0.5, 1 - 2**-53]).tolist() == [3, 250, 250]


def test_drawn_frequencies_follow_the_probabilities():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(5))
    count = 20_000
    numbers = torch.tensor([uniform(99, index) for index in range(count)], dtype=torch.float64)
    drawn = draw(logits.expand(count, 12), u=numbers)
    expected = torch.softmax(logits[0].double(), 0) * count
    observed = torch.bincount(drawn, minlength=12)
    chi_squared = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_squared < 31.3  # 99.9 % point at 11 degrees of freedom; the numbers are fixed, so this cannot flake


def test_non_finite_rows_are_named():
    for bad in (torch.nan, torch.inf):
        logits = torch.zeros(4, 10)
        logits[[1, 3], 5] = bad
        with pytest.raises(NonFiniteLogits, match=r"rows \[1, 3\]") as caught:
            draw(logits)
        assert caught.value.rows == [1, 3]
    with pytest.raises(NonFiniteLogits):
        draw(torch.full((1, 10), -torch.inf), temperature=0.0)


def test_zero_rows():
    assert draw(torch.empty(0, 10)).shape == (0,)


@pytest.mark.parametrize("stream", [0, DRAFT, COIN])
def test_random_numbers_of_a_tensor_are_those_of_single_outputs(stream):
    seeds, indices = [-1, 0, 1, 2**63, 2**64 - 2, 2**63 - 1], [0, 1, 700, 2**31]
    found = uniforms(torch.tensor([[signed(seed)] for seed in seeds]), torch.tensor([indices]), stream)
    assert found.tolist() == [[uniform(seed, index, stream) for index in indices] for seed in seeds]


def test_uniform_is_a_pure_function_in_range():
    numbers = [uniform(seed, index) for seed in (-1, 0, 1, 2**63, 2**64 - 2) for index in range(200)]
    assert numbers == [uniform(seed, index) for seed in (-1, 0, 1, 2**63, 2**64 - 2) for index in range(200)]
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("axis", ["seed", "index"])
def test_uniform_is_flat_along_each_axis(axis):
    """Chi-squared over 64 bins, and of neighbouring pairs over 8 x 8, for running seeds and for running indices."""
    numbers = [uniform(n, 0) if axis == "seed" else uniform(7, n) for n in range(16_384)]
    bins = torch.bincount((torch.tensor(numbers, dtype=torch.float64) * 64).long(), minlength=64)
    first, second = (torch.tensor(numbers[start::2], dtype=torch.float64) for start in (0, 1))
    pairs = torch.bincount((first * 8).long() * 8 + (second * 8).long(), minlength=64)
    for observed in (bins, pairs):
        expected = observed.sum().item() / 64
        assert ((observed - expected) ** 2 / expected).sum().item() < 103.4  # 99.9 % point at 63 degrees of freedom
