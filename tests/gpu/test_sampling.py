"""Sampling on a GPU against the reference on the CPU, at the released vocabulary."""

import pytest
import torch

from dsv4_kernels.arrival import counters
from dsv4_kernels.sampling import reference, triton
from dsv4_kernels.sampling.logprobs import token_logprobs

VOCAB = 129_280
# Temperature, top-k, top-p, min-p.
SETTINGS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 50, 1.0, 0.0),
    (1.0, 0, 0.95, 0.0),
    (0.6, 0, 0.95, 0.05),
    (1.0, 0, 1.0, 0.02),
    (1.5, 3000, 0.9, 0.0),
    (1.0, 1, 1.0, 0.0),
]


def settings(rows):
    """Keyword arguments of `sample` on the CPU, all settings in turn."""
    columns = [
        torch.tensor(column) for column in zip(*(SETTINGS[row % len(SETTINGS)] for row in range(rows)), strict=True)
    ]
    numbers = torch.rand(rows, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    return dict(zip(("temperature", "top_k", "top_p", "min_p"), columns, strict=True)) | {"uniform": numbers}


def on_gpu(values):
    return {name: value.cuda() for name, value in values.items()}


@pytest.mark.parametrize(("rows", "deviation"), [(1, 4.0), (16, 4.0), (16, 1.0), (16, 0.01), (48, 3.0)])
def test_draws_as_the_reference(rows, deviation):
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1)) * deviation
    values = settings(rows)
    drawn, bad = triton.sample(logits.cuda(), **on_gpu(values))
    assert not bad.any()
    assert drawn.tolist() == reference.sample(logits, **values).tolist()


def test_equal_logits_are_ordered_by_id():
    logits = torch.randint(0, 6, (16, VOCAB), generator=torch.Generator().manual_seed(2)).float()
    values = settings(16)
    assert triton.sample(logits.cuda(), **on_gpu(values))[0].tolist() == reference.sample(logits, **values).tolist()


def test_256_rows_have_the_same_draws_in_one_batch_and_in_four():
    logits = torch.randn(256, VOCAB, device="cuda") * 4
    values = on_gpu(settings(256))
    together, _ = triton.sample(logits, **values)
    for first in range(0, 256, 64):
        part = slice(first, first + 64)
        drawn, _ = triton.sample(logits[part], **{name: value[part] for name, value in values.items()})
        assert torch.equal(drawn, together[part])


@pytest.mark.parametrize(("rows", "deviation"), [(1, 4.0), (64, 1.0), (300, 4.0)])
def test_a_row_has_the_same_draw_in_each_of_many_launches(rows, deviation):
    """No program reads what another has not stored yet, whoever comes last."""
    logits = torch.randn(rows, VOCAB, device="cuda") * deviation
    values = on_gpu(settings(rows) | {"top_p": torch.full((rows,), 0.95)})
    expected, _ = triton.sample(logits, **values)
    for _ in range(50):
        assert torch.equal(triton.sample(logits, **values)[0], expected)
    assert not counters(logits.device, rows).any()


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-53])
def test_rows_of_one_logit(uniform):
    """All tokens are as likely: 129,280 of them are listed, and ids alone tell them apart."""
    values = settings(8) | {"uniform": torch.full((8,), uniform, dtype=torch.float64)}
    logits = torch.full((8, VOCAB), 2.5)
    assert triton.sample(logits.cuda(), **on_gpu(values))[0].tolist() == reference.sample(logits, **values).tolist()


def test_a_captured_step_flags_rows_that_are_not_finite():
    logits = torch.randn(8, VOCAB, device="cuda")
    values = on_gpu(settings(8))
    triton.sample(logits, **values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn, bad = triton.sample(logits, **values)
    logits[1, 77], logits[3, 5], logits[6] = torch.nan, torch.inf, -torch.inf
    graph.replay()
    assert bad.tolist() == [False, True, False, True, False, False, True, False]
    good = ~bad
    expected = reference.sample(logits[good].cpu(), **{name: value[good].cpu() for name, value in values.items()})
    assert drawn[good].tolist() == expected.tolist()
    assert ((drawn >= 0) & (drawn < VOCAB)).all()


@pytest.mark.parametrize("num_top", [0, 1, 20, 64])
def test_log_probabilities_equal_the_reference(num_top):
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(9, VOCAB, generator=random) * 4
    logits[4] = logits[4].round()
    tokens = torch.randint(0, VOCAB, (9,), generator=random)
    expected = reference.token_logprobs(logits, tokens, num_top)
    found = token_logprobs(logits.cuda(), tokens.cuda(), num_top)
    assert torch.equal(found[1].cpu(), expected[1])
    for one, other in ((found[0], expected[0]), (found[2], expected[2])):
        assert torch.allclose(one.cpu(), other, rtol=1e-6, atol=1e-5)


def test_penalties_bias_and_bans_of_the_reference_run_on_the_device():
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 1000, generator=random)
    places = {"rows": torch.tensor([0, 0, 2, 3]), "token_ids": torch.tensor([5, 999, 7, 0])}
    changes = {"counts": torch.tensor([0, 3, 1, 2]), "repetition": torch.full((4,), 1.3)}
    changes |= {"frequency": torch.full((4,), 0.5), "presence": torch.full((4,), 0.25)}
    bias = {"values": torch.tensor([1.0, 2.0, -3.0, 4.0])}
    banned = {name: part[:1] for name, part in places.items()}

    def change(logits, places, changes, bias, banned):
        reference.penalise(logits, **places, **changes)
        reference.add_bias(logits, **places, **bias)
        reference.ban(logits, **banned)

    changed, arguments = logits.cuda(), [on_gpu(part) for part in (places, changes, bias, banned)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        change(changed, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    captured = logits.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        change(captured, *arguments)
    graph.replay()
    change(logits, places, changes, bias, banned)
    for found in (changed, captured):
        assert torch.allclose(found.cpu(), logits, rtol=1e-6, atol=1e-6)
