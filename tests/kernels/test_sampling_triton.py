"""The Triton sampler against the reference, by the interpreter on the CPU."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.poison import poisoned  # noqa: F401

from dsv4_kernels.arrival import counters
from dsv4_kernels.sampling import LOWEST, reference, triton


def settings(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.5):
    """Keyword arguments of `sample`, one value for all rows or one each."""

    def each(value, dtype):
        return torch.as_tensor(value, dtype=dtype).expand(rows).clone()

    return {
        "temperature": each(temperature, torch.float32),
        "top_k": each(top_k, torch.int64),
        "top_p": each(top_p, torch.float32),
        "min_p": each(min_p, torch.float32),
        "uniform": each(uniform, torch.float64),
    }


def assert_draws_as_the_reference(logits, **values):
    arguments = settings(logits.shape[0], **values)
    drawn, bad = triton.sample(logits, **arguments)
    assert not bad.any()
    assert drawn.dtype == torch.int64
    assert drawn.tolist() == reference.sample(logits, **arguments).tolist(), values


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
    (1.0, 0, 1.0, 2.0),
    (0.0, 3, 0.5, 0.0),
]


@pytest.mark.parametrize(("vocab", "spread"), [(1, 3.0), (7, 3.0), (700, 3.0), (5000, 3.0), (2500, 0.2)])
def test_draws_as_the_reference(vocab, spread):
    """Every setting in one batch; few tokens are kept, or so many (spread 0.2) that the whole row must be searched."""
    random = torch.Generator().manual_seed(vocab)
    columns = [torch.tensor(column) for column in zip(*SETTINGS, strict=True)]
    numbers = torch.rand(len(SETTINGS), generator=random, dtype=torch.float64)
    logits = torch.randn(len(SETTINGS), vocab, generator=random) * spread
    names = ("temperature", "top_k", "top_p", "min_p")
    assert_draws_as_the_reference(logits, **dict(zip(names, columns, strict=True)), uniform=numbers)


def test_few_programs_a_row_and_lists_of_several_blocks(monkeypatch):
    monkeypatch.setattr(triton, "BLOCK", 32)
    monkeypatch.setattr(triton, "TURN", 64)
    monkeypatch.setattr(triton, "PROGRAMS", 36)
    random = torch.Generator().manual_seed(1)
    rows = 18
    logits = torch.randn(rows, 250, generator=random) * torch.linspace(0.3, 9, rows).unsqueeze(1)
    assert_draws_as_the_reference(
        logits,
        temperature=torch.rand(rows, generator=random) + 0.5,
        top_k=torch.randint(0, 40, (rows,), generator=random),
        top_p=torch.rand(rows, generator=random) * 0.5 + 0.5,
        min_p=torch.tensor([0.0, 0.01, 0.2]).repeat(rows // 3),
        uniform=torch.rand(rows, generator=random, dtype=torch.float64),
    )


def test_the_released_vocabulary():
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 129280, generator=random) * 4
    assert_draws_as_the_reference(logits, top_k=[0, 50, 0], top_p=[1.0, 0.9, 0.5], uniform=[0.7, 0.99, 0.999])


def test_equal_logits_are_ordered_by_id():
    logits = torch.zeros(4, 400)
    logits[:, ::2] = -0.0
    for values in ({}, {"top_k": 399}, {"top_p": 0.99999}, {"min_p": 0.5}):
        assert_draws_as_the_reference(logits, uniform=[0.0, 0.25, 0.5, 1 - 2**-53], **values)


def test_few_values_many_ties():
    random = torch.Generator().manual_seed(3)
    logits = torch.randint(0, 5, (4, 900), generator=random).float()
    numbers = torch.rand(4, generator=random, dtype=torch.float64)
    for values in ({"top_k": 150}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 500, "top_p": 0.9}):
        assert_draws_as_the_reference(logits, uniform=numbers, **values)


def test_greedy_takes_the_lowest_id_of_equal_maxima():
    logits = torch.zeros(2, 5000)
    logits[:, [7, 30, 4500]] = 2.0
    logits[1, 7] = 0.0
    drawn, _ = triton.sample(logits, **settings(2, temperature=0.0))
    assert drawn.tolist() == [7, 30]
    drawn, _ = triton.sample(logits, **settings(2, temperature=[0.0, 1.0], top_k=1))
    assert drawn.tolist() == [7, 30]


def test_rows_without_filters_over_chunks_of_different_height():
    """The mass of a chunk counts relative to its own largest logit."""
    random = torch.Generator().manual_seed(9)
    row = torch.randn(9000, generator=random) * 2
    row[4096:8192] -= 3.0
    row[8192:] += 1.5
    rows = 21
    assert_draws_as_the_reference(
        row.expand(rows, -1), temperature=0.8, uniform=torch.linspace(0, 1 - 2**-53, rows, dtype=torch.float64)
    )
    row[8500:] = -torch.inf
    given = settings(1, temperature=0.8, uniform=1.0)
    assert triton.sample(row.unsqueeze(0), **given)[0].tolist() == [8499]


def test_the_random_number_one_gives_the_last_token_that_filters_keep():
    """Drafts are judged with it (spec_accept)."""
    random = torch.Generator().manual_seed(7)
    logits = torch.randn(4, 800, generator=random) * torch.tensor([1.0, 2.0, 4.0, 1.0]).unsqueeze(1)
    logits[3] = logits[3].round()
    for values in ({"top_k": 30}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 90, "top_p": 0.7, "min_p": 0.01}):
        given = settings(4, temperature=0.8, **values)
        drawn, _ = triton.sample(logits, **given | {"uniform": torch.ones(4, dtype=torch.float64)})
        del given["uniform"]
        kept = reference.distribution(logits, **given) > 0
        order = reference._descending(logits, 800)
        assert drawn.tolist() == [row[keeps[row]][-1].item() for row, keeps in zip(order, kept, strict=True)], values


@pytest.mark.usefixtures("poisoned")
def test_nothing_is_read_that_was_not_written_and_the_counters_are_zero_again():
    logits = torch.randn(5, 5000, generator=torch.Generator().manual_seed(8)) * 2
    assert_draws_as_the_reference(
        logits,
        temperature=[0.0, 1.0, 1.0, 0.9, 1.0],
        top_k=[0, 0, 40, 0, 900],
        top_p=[1.0, 1.0, 1.0, 0.95, 0.9],
        min_p=[0.0, 0.0, 0.0, 0.0, 0.001],
        uniform=[0.1, 0.3, 0.5, 0.7, 0.9],
    )
    assert not counters(logits.device, 5).any()


def test_tiny_and_huge_temperatures():
    logits = torch.tensor([[1.0, 3.0, 2.9]])
    assert_draws_as_the_reference(logits, temperature=1e-30, uniform=0.999)
    assert_draws_as_the_reference(logits, temperature=1e30, uniform=0.999)
    assert_draws_as_the_reference(logits, temperature=1e30, uniform=0.999, min_p=0.5)


@pytest.mark.parametrize("banned", [-torch.inf, LOWEST])
def test_banned_tokens_are_drawn_only_where_nothing_else_is(banned):
    logits = torch.full((4, 300), banned)
    logits[:3, [3, 250]] = 0.0
    for values in ({}, {"top_k": 200}, {"top_p": 0.9999}, {"min_p": 1e-9}):
        drawn, bad = triton.sample(logits, **settings(4, uniform=[0.0, 0.5, 1 - 2**-53, 0.5], **values))
        assert drawn[:3].tolist() == [3, 250, 250]
        assert bad.tolist() == [False, False, False, banned == -torch.inf]


def test_a_row_does_not_depend_on_its_batch():
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(9, 600, generator=random) * torch.linspace(0.1, 6, 9).unsqueeze(1)
    values = settings(9, [0.0, 0.3, 1.0] * 3, [0, 30, 0] * 3, 0.9, 0.01, torch.rand(9, generator=random).double())
    together, _ = triton.sample(logits, **values)
    for row in range(9):
        alone, _ = triton.sample(logits[row : row + 1], **{key: value[row : row + 1] for key, value in values.items()})
        assert alone.item() == together[row].item()


def test_rows_that_are_not_finite_are_flagged_and_leave_the_others_alone():
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(5))
    expected = reference.sample(logits, **settings(6, top_p=0.9))
    logits[1, 4999] = torch.nan
    logits[3, 5] = torch.inf
    logits[5] = -torch.inf
    logits[0, :100] = -torch.inf
    for values in ({"top_p": 0.9}, {}, {"temperature": 0.0}, {"top_k": 9}):
        drawn, bad = triton.sample(logits, **settings(6, **values))
        assert bad.tolist() == [False, True, False, True, False, True]
        assert ((drawn >= 0) & (drawn < 5000)).all()
        if values == {"top_p": 0.9}:
            assert drawn[[2, 4]].tolist() == expected[[2, 4]].tolist()


def test_zero_rows_and_rows_of_a_larger_matrix():
    drawn, bad = triton.sample(torch.empty(0, 10), **settings(0))
    assert drawn.shape == bad.shape == (0,)
    logits = torch.randn(4, 90, generator=torch.Generator().manual_seed(6))
    values = settings(4, top_k=20)
    assert torch.equal(triton.sample(logits[:, :70], **values)[0], reference.sample(logits[:, :70], **values))


def test_wrong_dtypes_are_named():
    with pytest.raises(ValueError, match=r"are \(torch\.float16, torch\.float32"):
        triton.sample(torch.ones(1, 5).half(), **settings(1))
