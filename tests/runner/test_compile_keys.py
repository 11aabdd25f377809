"""Nothing is compiled after start-up: what steps launch has the compile keys of what start-up launched.

Nothing is computed: every logit is zero. A GPU replays graphs, here each step launches all of its kernels.
"""

import random

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.all_kinds import crowd
from support.compile_keys import record_keys
from support.device_models import both, checkpoint
from support.engine import Engine
from support.pro_network import pro_network

from dsv4_kernels.deterministic import deterministic
from dsv4_kernels.sampling.triton import sample
from dsv4_kernels.sparse_attention.triton import HEADS


@pytest.fixture(scope="module", params=["small", "pro", "pro on GB300"])
def network(request, tmp_path_factory):
    if request.param != "small":
        return pro_network("fp8" if request.param == "pro" else "fp4")
    return both(checkpoint(tmp_path_factory.mktemp("device") / "model"), torch.device("cpu"))[1]


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize(("num_slots", "num_draft_tokens"), [(3, 0), (20, 2)])
def test_no_step_needs_a_kernel_that_start_up_has_not_made(
    network, monkeypatch, num_slots, num_draft_tokens, is_deterministic
):
    draw = random.Random(num_slots)
    is_hopper = network.blocks[0].moe.w13.form != "fp4"
    keys = record_keys(monkeypatch, is_hopper)
    with deterministic(is_deterministic):
        engine = Engine(
            network, num_slots=num_slots, num_pages=32, max_step_tokens=512, num_draft_tokens=num_draft_tokens,
            on_device=True,
        )  # fmt: skip
        engine.runner.make_ready()
        made = set(keys)
        has_roles = is_hopper and network.config.num_attention_heads % HEADS == 0
        assert any("attend_specialized" in key for key in made) == has_roles  # a Gluon kernel is counted as well
        requests = crowd(network.config, 24, draw)
        outputs = engine.run(requests, {request.request_id: draw.randint(0, 30) for request in requests})
    assert keys == made, "\n".join(sorted(keys - made))
    for request in requests:
        output, sampling = outputs[request.request_id], request.sampling
        assert len(output.prompt_logits) == min(sampling.num_prompt_logits, len(request.prompt_ids))
        if sampling.num_prompt_logprobs is not None:
            assert len(output.prompt_logprobs) == len(request.prompt_ids) - 1
    if num_draft_tokens:
        assert engine.scheduler.stats().num_verifies > 10


def test_what_the_compiler_specialises_on_makes_another_key(monkeypatch):
    """As Triton does it: whether an address and a number are multiples of 16, constants, and options."""
    keys = record_keys(monkeypatch)

    def num_keys(*shapes):
        keys.clear()
        for rows, vocab in shapes:
            numbers = {name: torch.zeros(rows) for name in ("temperature", "top_p", "min_p")}
            whole = torch.zeros(rows, dtype=torch.int64)
            sample(torch.zeros(rows, vocab), top_k=whole, uniform=torch.zeros(rows).double(), **numbers)
        return len(keys)

    once = num_keys((4, 160))
    assert num_keys((4, 160), (4, 160)) == once > 0
    assert num_keys((4, 160), (4, 161)) > once
