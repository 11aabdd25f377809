"""The index arithmetic of a step by kernels, in the interpreter, against the torch form."""

import dataclasses

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from torch import Tensor

from dsv4_kernels.metadata import Rows, bench, plan
from dsv4_kernels.metadata import triton as kernels
from dsv4_kernels.metadata.cases import CASES
from dsv4_kernels.sampling import LOWEST
from dsv4_kernels.sampling.finite import keep_finite


def check_equal(found, expected):
    """All tensors, with their dtypes; what has no order of rows in memory is compared by value."""
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        check_equal(tuple(found.values()), tuple(expected.values()))
    elif isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            check_equal(one, other)
    else:
        for field in dataclasses.fields(expected):
            check_equal(getattr(found, field.name), getattr(expected, field.name))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plan_and_an_end_are_those_of_the_torch_form(case):
    given = case.make(1)
    expected, found = plan.plan_step(**given), kernels.plan_step(**given)
    check_equal(found, expected)
    random, num, most = torch.Generator().manual_seed(2), len(case.requests), case.num_drafts
    accepted = drafts = None
    if most:
        chosen = torch.randint(0, 1000, (most, num), generator=random)
        drafts = plan.place_drafts(expected, chosen)
        check_equal(kernels.place_drafts(found, chosen), drafts)
        check_equal(found.ids, expected.ids)
        accepted = (torch.rand(num, generator=random) * (expected.num_drafts + 1)).long()
        for each in (expected, found):
            each.num_wrong.copy_(torch.randint(0, 2, (most, num), generator=torch.Generator().manual_seed(3)))
    tokens, is_bad = torch.randint(0, 1000, (num,), generator=random), torch.arange(num) % 3 == 1
    ends = []
    for module, step in ((plan, expected), (kernels, found)):
        left = given["left"].clone()
        results, rows, banks = module.end_step(step, left, tokens, is_bad, 1 + most, accepted, drafts)
        firsts = step.first_rows[step.counts > 0].long()
        ends.append((results, rows[firsts], banks, left[:, :-1]))
    check_equal(ends[1], ends[0])


def test_each_row_takes_the_streams_before_it_and_slots_those_that_stay():
    case = next(case for case in CASES if case.name == "verifies")
    step = kernels.plan_step(**case.make(1))
    random = torch.Generator().manual_seed(4)
    streams = torch.randn(case.num_rows, 4, 700, generator=random).bfloat16()
    stored = torch.randn(9, 2800, generator=random).bfloat16()
    accepted = torch.tensor([1, 1, 0, 0])
    tokens = torch.zeros(4, dtype=torch.int64)
    drafts = torch.zeros(4, 3, dtype=torch.int64)
    _, ends, _ = kernels.end_step(step, torch.zeros(2, 9, dtype=torch.int64), tokens, tokens > 0, 4, accepted, drafts)
    other = stored.clone()
    expected = plan.shift_streams(step.rows, streams, other, ends)
    assert torch.equal(kernels.shift_streams(step.rows, streams, stored, ends), expected)
    assert torch.equal(stored, other)
    assert torch.equal(stored[[3, 0, 7]], streams.flatten(1)[[1, 5, 6]])


def test_values_that_are_not_finite_become_the_lowest_and_are_told():
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    logits[1, 4999], logits[2, 0], logits[3, 3] = torch.inf, torch.nan, -torch.inf
    out, wrong = torch.empty(4, 2, 5000), torch.zeros(4, dtype=torch.int32)
    keep_finite(logits, out[:, 1], wrong)
    assert torch.equal(out[:, 1], logits.nan_to_num(LOWEST, LOWEST, LOWEST))
    assert wrong.tolist() == [0, 1, 1, 1]


def test_other_inputs_are_refused():
    left = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="11 numbers of each"):
        kernels.plan_step(torch.zeros(10, 1, dtype=torch.int64), left[0], left, 0)


def test_a_request_goes_on_behind_the_drafts_that_the_host_has_not_seen():
    """Position and random numbers are those of a host that has."""
    case = next(case for case in CASES if case.name == "verifies")
    given = case.make(1)
    start, index, follows = (given["inputs"][plan.INPUTS.index(name)] for name in ("start", "index", "follows"))
    accepted = given["left"][plan.ACCEPTED]
    follows[:3], accepted[[3, 0, 7]] = 1, torch.tensor([2, 0, 1])
    found = kernels.plan_step(**given)
    start[:3] += accepted[[3, 0, 7]]
    index[:3] += accepted[[3, 0, 7]]
    follows[:] = 0
    check_equal(found, kernels.plan_step(**given))
    assert found.starts[:3].tolist() == [19, 1, 256]


def test_no_row_of_padding_belongs_to_a_request():
    step = kernels.plan_step(**CASES[-1].make(0))
    assert isinstance(step.rows, Rows)
    assert step.rows.positions.tolist() == step.mtp_positions[-3:].tolist() == [-1] * 3


def test_the_floors_of_one_request():
    assert bench.plan_bytes(1) == 8 * 11 + 4 * 36
    assert bench.shift_bytes(1, 7168) == 2 * (4 + 1) * 4 * 7168 * 2
