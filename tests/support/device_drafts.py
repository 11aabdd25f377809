"""Drafts of the device engine against those of the CPU engine; the device is a parameter, see support.device_engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.device_engine import STEP_BOUND, median_row, regrets_of
from support.engine import Engine, Inject

from dsv4_kernels.metadata import StepPlan
from dsv4_kernels.metadata.triton import plan_step
from dsv4_kernels.sampling import distribution, sample
from dsv4serve.model.device import DeviceTransformer
from dsv4serve.model.transformer import Transformer
from dsv4serve.runner.device_batch import empty_inputs, fill_inputs
from dsv4serve.runner.device_drafts import judge as judge_on_device
from dsv4serve.speculative import judge
from dsv4serve.types import Request, RequestOutput

# temperature, top-k, top-p, min-p
SETTINGS = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 9, 0.9, 0.05)]
PATTERNS: dict[str, Callable[[str, int], bool]] = {  # whether the draft of a request's output is right
    "none": lambda name, index: False,
    "all": lambda name, index: True,
    "alternating": lambda name, index: index % 2 == 0,
}


def check_injected(
    network: DeviceTransformer,
    requests: list[Request],
    expected: dict[str, RequestOutput],
    accepts: Callable[[str, int], bool],
    **settings: Any,
) -> Engine:
    """Drafts that are right where `accepts` says so, of a request and the index of an output, change no token."""
    engine = Engine(network, on_device=True, inject=injected(expected, accepts, network.config.vocab_size), **settings)
    outputs = engine.run(requests)
    assert {name: output.token_ids for name, output in outputs.items()} == {
        name: output.token_ids for name, output in expected.items()
    }
    return engine


def injected(expected: dict[str, RequestOutput], accepts: Callable[[str, int], bool], vocab: int) -> Inject:
    """Drafts that are right where `accepts` says so."""

    def inject(name: str, index: int, own: int) -> int:
        tokens = expected[name].token_ids
        right = tokens[index] if index < len(tokens) else own
        return right if accepts(name, index) else (right + 1) % vocab

    return inject


def rounding_regret(reference: Transformer, rounded: list[Transformer], requests: list[Request]) -> float:
    """What the reference itself loses by a rounding of its embeddings (`roundings`): the largest regret of a greedy
    token."""
    worst = 0.0
    for network in rounded:
        outputs = Engine(network).run(requests)
        worst = max([worst, *(float(regrets_of(reference, one, outputs[one.request_id]).max()) for one in requests)])
    return worst


def live_state(engine: Engine, slot: int, num_computed: int) -> list[torch.Tensor]:
    """All that the next row of a request sees of its slot, which has so many positions; pages excepted."""
    pools, layout = engine.runner.pools, engine.runner.pools.layout
    window = layout.window_ring_rows - layout.num_draft_tokens
    found = [pools.streams[slot]]
    for layer in pools.layers:
        next_row = num_computed - (layer is pools.layers[-1])  # the MTP block stands one row behind
        kept = [(layer.window, layout.window_ring_rows, max(next_row - window + 1, 0), next_row)]
        first = max(num_computed // 4 * 4 - 4, 0)
        kept += [(ring, layout.c4_ring_rows, first, num_computed) for ring in (layer.c4_state, layer.index_state)]
        for planes, ring_rows, begin, end in kept:
            at = torch.arange(begin, end) % ring_rows
            found += [plane.view(-1, ring_rows, plane.shape[1])[slot, at] for plane in planes or ()]
        if layer.c128_state is not None:
            found.append(layer.c128_state[slot, 0])
    return found


def check_drafts(
    reference: Transformer, engine: Engine, requests: list[Request], inject: Inject, bound: float = STEP_BOUND
) -> None:
    """What injected drafts of a device's engine stand in for has the logits of the CPU engine's, first and chained."""
    layout = engine.runner.pools.layout
    other = Engine(reference, num_draft_tokens=layout.num_draft_tokens, inject=inject)
    outputs = other.run(requests)
    found, expected = [], []
    for (name, index, place), row in engine.draft_logits.items():
        # Near ties may part the engines' histories.
        same = outputs[name].token_ids[:index] == engine.outputs[name].token_ids[:index]
        if same and (name, index, place) in other.draft_logits:
            found.append(row)
            expected.append(other.draft_logits[name, index, place])
    assert len(found) > len(engine.draft_logits) // 4
    error = median_row(torch.stack(found), torch.stack(expected))
    assert error <= bound, error


def some_requests(num: int, num_drafts: int, random: torch.Generator, device: torch.device) -> StepPlan:
    """Every fourth has no drafts, the others 1 to `num_drafts`, with all settings."""
    settings = zip(*(SETTINGS[row % len(SETTINGS)] for row in range(num)), strict=True)
    counts = torch.randint(1, num_drafts + 1, (num,), generator=random)
    counts[::4] = 0
    columns: dict[str, Any] = {"slot": range(num), "start": range(9, 9 + num), "count": (counts + 1).tolist()}
    columns |= {
        "num_drafts": counts.tolist(),
        **dict(zip(("temperature", "top_k", "top_p", "min_p"), settings, strict=True)),
    }
    columns["seed"] = torch.randint(-(2**63), 2**63 - 1, (num,), generator=random).tolist()
    inputs = empty_inputs(num, pinned=False)
    fill_inputs(inputs, columns)
    ids = torch.zeros(num * (1 + num_drafts), dtype=torch.int64)
    left = torch.zeros(2, num + 1, dtype=torch.int64, device=device)
    return plan_step(inputs.to(device), ids.to(device), left, num_drafts)


def check_judge(device: torch.device, num_drafts: int) -> None:
    """Verifies are judged as on CPU, rows of requests without drafts sampled as `sample` does."""
    num, vocab, random = 24, 150, torch.Generator().manual_seed(num_drafts)
    requests = some_requests(num, num_drafts, random, device)
    target = torch.randn(num, num_drafts + 1, vocab, generator=random) * 2
    proposal = target[:, :-1] + torch.randn(num, num_drafts, vocab, generator=random) * 0.7
    has_draft = torch.arange(num_drafts) < requests.num_drafts.cpu().unsqueeze(1)
    drafts = torch.where(has_draft, proposal.argmax(-1), -1)
    logits = torch.cat([target.flatten(0, 1), proposal.flatten(0, 1)])
    accepted, tokens, is_bad = judge_on_device(logits.to(device), requests, drafts.to(device))
    settings = {name: value.cpu() for name, value in requests.settings.items()}
    coins, draws, is_verify = requests.coins.cpu(), requests.draws.cpu(), requests.num_drafts.cpu() > 0
    sampled = [row for row in range(num) if settings["temperature"][row] > 0]
    repeated = {name: value[sampled].repeat_interleave(num_drafts) for name, value in settings.items()}
    expected = judge(
        target.flatten(0, 1),
        torch.arange(num * (num_drafts + 1)).view(num, -1),
        drafts,
        distribution(proposal[sampled].flatten(0, 1), **repeated).unflatten(0, (len(sampled), -1)),
        sampled=sampled,
        settings=settings,
        coins=coins[sampled],
        draws=draws[sampled],
    )
    alone = sample(target[:, 0].clone(), **settings, uniform=draws[:, 0].contiguous())
    assert torch.equal(accepted.cpu(), torch.where(is_verify, expected[0], 0))
    assert torch.equal(tokens.cpu(), torch.where(is_verify, expected[1], alone))
    assert len(set(accepted.tolist())) == num_drafts + 1
    assert not bool(is_bad.any())
