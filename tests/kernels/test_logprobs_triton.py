"""The Triton log probabilities against the reference, by the interpreter on the CPU."""

import math

import numpy as np
import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel

from dsv4_kernels.sampling import reference
from dsv4_kernels.sampling.logprobs import token_logprobs


@pytest.mark.parametrize(("vocab", "num_top"), [(1, 1), (7, 7), (700, 0), (5000, 20), (9000, 64)])
def test_equal_the_reference(vocab, num_top):
    random = torch.Generator().manual_seed(vocab)
    logits = torch.randn(3, vocab, generator=random) * 5
    logits[1] = (logits[1] / 5).round()  # many ties, zeros of both signs
    logits[2, vocab // 2 :] = -torch.inf if vocab > 1 else 0.0
    tokens = torch.randint(0, vocab, (3,), generator=random)
    found, expected = token_logprobs(logits, tokens, num_top), reference.token_logprobs(logits, tokens, num_top)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert torch.equal(found[1], expected[1])
    for one, other in ((found[0], expected[0]), (found[2], expected[2])):
        assert torch.allclose(one, other, rtol=1e-6, atol=2e-6)


def test_the_best_tokens_of_one_block_and_of_equal_blocks():
    """All in one block, and blocks whose largest are equal: lower ids win."""
    logits = torch.zeros(2, 6000)
    logits[0, 256:300] = torch.randn(44, generator=torch.Generator().manual_seed(1)).abs() + 1
    logits[1, ::7] = 3.0
    ids = torch.tensor([256, 7])
    found, expected = token_logprobs(logits, ids, 50), reference.token_logprobs(logits, ids, 50)
    assert torch.equal(found[1], expected[1])


def test_the_whole_vocabulary_is_summed_to_a_few_units_in_the_last_place():
    random = torch.Generator().manual_seed(6)
    logits = torch.randn(2, 129_280, generator=random) * torch.tensor([[4.0], [0.1]])
    tokens = torch.tensor([5, 129_279])
    chosen, top_ids, top = token_logprobs(logits, tokens, 2)
    for row, values in enumerate(logits.double().numpy()):
        total = np.log(math.fsum(np.exp(values)))
        assert math.isclose(chosen[row], values[tokens[row]] - total, abs_tol=3e-6)
        assert np.allclose(top[row].double(), values[top_ids[row]] - total, rtol=0, atol=3e-6)


def test_zero_rows_and_too_many_best_tokens():
    assert [tuple(part.shape) for part in token_logprobs(torch.empty(0, 9), torch.empty(0, dtype=torch.int64), 2)] == [
        (0,), (0, 2), (0, 2),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"num_top is 10.*expected at most 9"):
        token_logprobs(torch.ones(1, 9), torch.zeros(1, dtype=torch.int64), 10)
