"""The Triton router on a real GPU, against scores in float64."""

import pytest
import torch

from dsv4_kernels.cases import DEMO, FLASH, PRO
from dsv4_kernels.router.cases import Case
from dsv4_kernels.router.triton import route

BOUND = 1e-5  # of a weight, relative; and how far a chosen score may lie below one that was not
SHAPES = {"pro": PRO, "flash": FLASH, "demo": DEMO}


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 9, 300, 2000])
@pytest.mark.parametrize("name", SHAPES)
def test_the_best_experts_and_their_weights(name, num_tokens, weight_dtype):
    inputs = Case(name, num_tokens, SHAPES[name]).make(5, torch.bfloat16)
    inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    inputs["gate_weight"] = inputs["gate_weight"].to(weight_dtype)
    positions = torch.arange(num_tokens, dtype=torch.int32, device="cuda")
    positions[3::7] = -1
    real = positions >= 0
    inputs["x"][~real] = torch.nan
    weights, ids = route(**inputs, positions=positions)
    assert (ids[~real] == -1).all()
    assert not weights[~real].any()
    weights, ids = weights[real], ids[real]
    logits = inputs["x"][real].double() @ inputs["gate_weight"].double().t()
    scores = torch.nn.functional.softplus(logits).sqrt()
    biased = scores + inputs["bias"].double()
    chosen = biased.gather(1, ids)
    assert (chosen[:, :-1] >= chosen[:, 1:] - BOUND).all()
    rest = biased.scatter(1, ids, -torch.inf)
    assert (rest <= chosen[:, -1:] + BOUND).all()
    expected = scores.gather(1, ids)
    expected *= inputs["scale"] / expected.sum(1, keepdim=True)
    assert ((weights - expected).abs() <= BOUND * expected).all()


def test_hash_layers_and_ties():
    inputs = Case("flash", 50, FLASH).make(6, torch.bfloat16)
    inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    table = torch.rand(FLASH.vocab_size, 8, device="cuda").argsort(1)[:, :6].contiguous()
    _, ids = route(**(inputs | {"tid2eid": table, "bias": None}))
    assert torch.equal(ids, table[inputs["token_ids"]])
    inputs["gate_weight"][:] = inputs["gate_weight"][:1].clone()
    inputs["bias"][:] = -1.0
    assert route(**inputs)[1].tolist() == [[0, 1, 2, 3, 4, 5]] * 50
