"""Expert parallelism over real processes against one process that has all experts, bit for bit."""

import itertools
import random

import pytest
import torch
from support.expert_ranks import run_ranks

from dsv4_kernels.mega_moe.parallel import ExpertMap, ExpertParallel
from dsv4_kernels.mega_moe.parallel.wire import RowFormat
from dsv4_kernels.mega_moe.reference import add_routed, mega_moe, shared_expert
from dsv4_kernels.quant import dequantize_fp4_weight, fake_quantize_fp4, fake_quantize_fp8
from dsv4serve.distributed.placement import place_experts

HIDDEN, WIDTH, NUM_EXPERTS, TOP_K = 256, 128, 12, 3
ROUTINGS = ("even", "skewed", "one expert", "some without")


def weight(draw, *shape):
    """FP4 values of one scale: with few bits, float32 sums of products with FP8 or FP4 values are exact, so that the
    order in which a library sums them does not show."""
    packed = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=draw)
    scale = torch.full((*shape[:-1], shape[-1] // 32), 127 - 5, dtype=torch.uint8)
    return dequantize_fp4_weight(packed, scale)


def make_weights(draw):
    return {
        "w13": weight(draw, NUM_EXPERTS, 2 * WIDTH, HIDDEN),
        "w2": weight(draw, NUM_EXPERTS, HIDDEN, WIDTH),
        "shared_w13": weight(draw, 2 * WIDTH, HIDDEN),
        "shared_w2": weight(draw, HIDDEN, WIDTH),
    }


def make_tokens(draw, num_tokens, routing, dtype):
    chance = torch.ones(NUM_EXPERTS) if routing != "skewed" else 0.5 ** torch.arange(NUM_EXPERTS)
    ids = torch.empty(num_tokens, TOP_K, dtype=torch.int64)
    for row in range(num_tokens):
        ids[row] = torch.multinomial(chance, TOP_K, generator=draw)
    if routing == "one expert":
        ids[:, 0], ids[:, 1:] = 7, -1
    if routing == "some without":
        ids[torch.rand(ids.shape, generator=draw) < 0.4] = -1
    x = torch.randn(num_tokens, HIDDEN, generator=draw)
    return {"x": x.to(dtype), "expert_ids": ids, "weights": torch.rand(num_tokens, TOP_K, generator=draw) + 0.1}


def make_scenarios(num_ranks):
    draw, dice = torch.Generator().manual_seed(num_ranks), random.Random(num_ranks)
    weights = make_weights(draw)
    ids = list(range(NUM_EXPERTS))
    dealt = [ids[rank::num_ranks] for rank in range(num_ranks)]
    dice.shuffle(ids)
    cut = NUM_EXPERTS // 3
    uneven = [ids[:cut], ids[cut:], *[[] for _ in range(num_ranks - 2)]]  # some ranks may have no experts
    hot = [list(mine) for mine in place_experts([0.5**one for one in range(NUM_EXPERTS)], num_ranks, 9)]
    everywhere = [ids] * num_ranks
    scenarios = {}
    for routing, activations in itertools.product(ROUTINGS, ("bf16", "fp8", "fp4")):
        placements = {"dealt": dealt, "uneven": uneven} | (
            {} if activations == "bf16" else {"hot": hot, "everywhere": everywhere}
        )
        for place, experts in placements.items():
            counts = [dice.choice([0, 1, 2, 9, 30]) for _ in range(num_ranks)]
            scenarios[f"{routing}, {activations}, {place}"] = {
                "experts": experts,
                "num_experts": NUM_EXPERTS,
                "options": {"limit": 2.0, "activations": activations},
                "weights": weights,
                "tokens": [make_tokens(draw, count, routing, torch.bfloat16) for count in counts],
            }
    exact = scenarios["even, bf16, dealt"]
    tokens = [one | {"x": one["x"].float() + 2.0**-12} for one in exact["tokens"]]
    scenarios["float32"] = exact | {"tokens": tokens}
    nobody = [make_tokens(draw, 0, "even", torch.bfloat16)] * num_ranks
    scenarios["no tokens"] = scenarios["even, fp8, hot"] | {"tokens": nobody}
    mixed = scenarios["even, bf16, dealt"]
    scenarios["W4A16 with an FP8 shared expert"] = mixed | {"options": mixed["options"] | {"quantize_shared": True}}
    return scenarios


@pytest.fixture(scope="module", params=[2, 4])
def ran(request, tmp_path_factory):
    """(scenarios, what each rank found)."""
    scenarios = make_scenarios(request.param)
    return scenarios, run_ranks(tmp_path_factory.mktemp("ranks"), request.param, scenarios)


def together(scenario):
    """What one rank with all experts gives the tokens of all ranks, as a batch of each. The shared expert runs where
    the tokens are, and torch's float32 product gives one row other bits than four."""
    tokens = {key: torch.cat([one[key] for one in scenario["tokens"]]) for key in ("x", "expert_ids", "weights")}
    weights, options = dict(scenario["weights"]), dict(scenario["options"])
    shared = {"w13": weights.pop("shared_w13"), "w2": weights.pop("shared_w2"), "limit": options["limit"]}
    shared["quantize"] = options.pop("quantize_shared", options["activations"] != "bf16")
    given = torch.cat([shared_expert(one["x"], **shared) for one in scenario["tokens"]])
    return add_routed(given, **tokens, **weights, **options).split([len(one["x"]) for one in scenario["tokens"]])


def test_equal_to_one_rank_bit_for_bit(ran):
    scenarios, ranks = ran
    counts = set()
    for name, scenario in scenarios.items():
        for rank, expected in enumerate(together(scenario)):
            found = ranks[rank][name][0]
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), (name, rank)
            counts.add(len(expected))
    assert {0, 1} <= counts


def test_a_token_has_the_bits_that_it_has_alone(ran):
    """Only where sums are exact: torch's product gives one row other bits than four."""
    scenarios, ranks = ran
    for name in ("skewed, fp8, hot", "even, fp4, everywhere", "some without, fp8, dealt"):
        scenario = scenarios[name]
        for rank, tokens in enumerate(scenario["tokens"]):
            for row in range(len(tokens["x"])):
                one = {key: value[row : row + 1] for key, value in tokens.items()}
                alone = mega_moe(**one, **scenario["weights"], **scenario["options"])
                assert torch.equal(alone[0], ranks[rank][name][0][row]), (name, rank, row)


def test_traffic_is_one_row_for_each_other_rank_and_one_output_for_each_pair(ran):
    scenarios, ranks = ran
    some = 0
    for name, scenario in scenarios.items():
        experts, num_ranks = scenario["experts"], len(ranks)
        dispatched, said = [0] * num_ranks, [0] * num_ranks
        for rank, tokens in enumerate(scenario["tokens"]):
            for row, ids in enumerate(tokens["expert_ids"].tolist()):
                targets = []
                for expert in ids:
                    copies = [place for place in range(num_ranks) if expert in experts[place]]
                    if copies:  # in turn, from the rank's own number on
                        targets.append(copies[(row + rank) % len(copies)])
                dispatched[rank] += len(set(targets) - {rank})
                said[rank] += sum(target != rank for target in targets)  # what comes back to the token's rank
        form = RowFormat(HIDDEN, TOP_K, scenario["options"]["activations"], scenario["tokens"][0]["x"].dtype)
        for rank in range(num_ranks):
            traffic = ranks[rank][name][1]
            assert traffic.num_calls == 1
            assert traffic.dispatch_bytes == dispatched[rank] * form.row_bytes, (name, rank)
            assert traffic.combine_bytes == said[rank] * HIDDEN * form.dtype.itemsize, (name, rank)
            assert traffic.total_bytes == traffic.dispatch_bytes + traffic.combine_bytes + 16 * (num_ranks - 1)
            some += traffic.total_bytes
    assert some > 0


def test_nothing_listens_off_loopback(ran):
    for results in ran[1]:
        assert set(results["listening"]) == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("hidden", "top_k", "activations", "expected"),
    [
        (7168, 6, "fp8", 7168 + 48 + 56 + 8),
        (7168, 6, "fp4", 3584 + 48 + 224),
        (7168, 6, "bf16", 14336 + 48),
        (256, 2, "fp8", 256 + 16 + 2 + 14),
    ],
)
def test_bytes_of_a_row(hidden, top_k, activations, expected):
    assert RowFormat(hidden, top_k, activations).row_bytes == expected


@pytest.mark.parametrize("activations", ["bf16", "fp8", "fp4"])
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_a_row_arrives_as_it_was_rounded(activations, num_rows):
    draw = torch.Generator().manual_seed(4)
    form = RowFormat(384, 3, activations)
    x = torch.randn(num_rows, 384, generator=draw).mul(torch.logspace(-4, 4, num_rows).unsqueeze(1)).bfloat16()
    slots = torch.randint(-1, 300, (num_rows, 3), generator=draw)
    weights = torch.rand(num_rows, 3, generator=draw)
    rows = form.pack(*form.quantize(x), slots, weights)
    assert rows.shape == (num_rows, form.row_bytes)
    values, scales, slots_in, weights_in = form.unpack(rows)
    rounded = {"bf16": x, "fp8": fake_quantize_fp8(x, 128), "fp4": fake_quantize_fp4(x)}[activations]
    assert torch.equal(form.dequantize(values, scales), rounded)
    assert torch.equal(slots_in, slots.int())
    assert torch.equal(weights_in, weights)


def test_copies_share_the_tokens_of_their_expert():
    experts = ExpertMap.build([[0, 1], [1, 2], [1, 2]], 3)
    ids = torch.tensor([[1, 0]] * 9 + [[2, -1]] * 4)
    ranks, slots = experts.targets(ids, 0)
    assert torch.bincount(ranks[:9, 0]).tolist() == [3, 3, 3]
    assert ranks[:9, 1].tolist() == [0] * 9
    assert sorted(ranks[9:, 0].tolist()) == [1, 1, 2, 2]
    assert ranks[9:, 1].tolist() == slots[9:, 1].tolist() == [-1] * 4
    for rank, slot, expert in torch.stack([ranks, slots, ids], -1).flatten(0, 1).tolist():
        assert rank < 0 or experts.experts[rank][slot] == expert
    assert experts.targets(ids, 1)[0][0, 0] != ranks[0, 0]  # other ranks begin with another copy
    again = experts.targets(ids, 0)
    assert torch.equal(again[0], ranks)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([[0, 1], [1]], r"no rank has the experts \[2\]"),
        ([[0, 0], [1, 2]], r"rank 0 has the experts \[0, 0\]"),
        ([[0, 1], [2, 3]], r"rank 1 has the experts \[2, 3\]; expected different ones of 0 .. 2"),
    ],
)
def test_a_map_that_cannot_be(experts, message):
    with pytest.raises(ValueError, match=message):
        ExpertMap.build(experts, 3)


class Alone:
    """A process group of one that never communicates."""

    def size(self):
        return 1

    def rank(self):
        return 0


def test_arguments_that_do_not_fit_the_map():
    with pytest.raises(ValueError, match="the map has 2 ranks, the group 1"):
        ExpertParallel(Alone(), ExpertMap.build([[0], [1]], 2))
    draw = torch.Generator().manual_seed(5)
    parallel = ExpertParallel(Alone(), ExpertMap.build([[0, 1, 2]], 3))
    tokens = make_tokens(draw, 2, "even", torch.bfloat16)
    with pytest.raises(ValueError, match="w13 has 12 experts, the map gives this rank 3"):
        parallel.mega_moe(**tokens, **make_weights(draw), limit=2.0, activations="fp8")
    with pytest.raises(ValueError, match="allowed: bf16, fp8, fp4"):
        parallel.mega_moe(**tokens, **make_weights(draw), limit=2.0, activations="int8")
