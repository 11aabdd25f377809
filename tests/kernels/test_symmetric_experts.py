"""The kernels of expert parallelism between linked GPUs, by the interpreter: the ranks are buffers of one process."""

import pytest
import torch
from support import triton_interpreter  # noqa: F401  # before any kernel
from support.poison import poisoned  # noqa: F401

from dsv4_kernels.cases import DEMO
from dsv4_kernels.mega_moe import triton as moe
from dsv4_kernels.mega_moe.cases import Case
from dsv4_kernels.mega_moe.combine import combine
from dsv4_kernels.mega_moe.parallel import ExpertMap, ExpertParallel
from dsv4_kernels.mega_moe.parallel.symmetric import Planes, Step, SymmetricExperts
from dsv4_kernels.mega_moe.parallel.wire import RowFormat
from dsv4_kernels.mega_moe.weights import relayout
from dsv4_kernels.quant.reference import quantize_fp4_weight
from dsv4serve.distributed.groups import Rank, process_group

NUM_EXPERTS, TOP_K, HIDDEN, TILE = DEMO.n_routed_experts, DEMO.num_experts_per_tok, DEMO.hidden_size, 16
PLACEMENTS = {
    "dealt": [list(range(rank, NUM_EXPERTS, 3)) for rank in range(3)],
    "copies": [[0, 1, 2, 3, 4, 5, 11], [3, 6, 7, 8, 11], [11, 10, 9, 3]],
    "uneven": [[4], [expert for expert in range(NUM_EXPERTS) if expert not in (4, 9)], [9]],
}
pytestmark = pytest.mark.usefixtures("poisoned")


class OneProcess:
    """Memory of all ranks side by side; phases are run for one rank after the other, which is every barrier."""

    def __init__(self, buffers, rank):
        self.mine = buffers[rank]
        self.addresses = torch.tensor([buffer.data_ptr() for buffer in buffers])

    def barrier(self):
        raise AssertionError("not here")


def make_ranks(placement, form, max_tokens):
    planes = Planes.build(form, len(placement), max_tokens)
    buffers = [torch.full((planes.num_bytes,), 255, dtype=torch.uint8) for _ in placement]
    experts = ExpertMap.build(placement, NUM_EXPERTS)
    return [SymmetricExperts(rank, experts, planes, OneProcess(buffers, rank)) for rank in range(len(placement))]


def run(ranks, tokens, shared, weights, limit, capacity):
    steps = [Step(rank, *one, capacity) for rank, one in zip(ranks, tokens, strict=True)]
    for step in steps:
        step.dispatch()
    for step, mine in zip(steps, weights, strict=True):
        step.products(*mine, limit, TILE)
    return [step.combine(one) for step, one in zip(steps, shared, strict=True)]


def stored(case, name, some, form):
    return relayout(*quantize_fp4_weight(case[name][some]), form=form)


def on_one_rank(x, expert_ids, weights, w13, w2, shared, *, limit, activations):
    """What ranks together must say: the same kernels with all experts, without an exchange."""
    inputs = moe.rounded_inputs(x, activations, w13.form)
    outputs = moe.pair_outputs(
        *inputs, expert_ids, weights, w13, w2, limit=limit, activations=activations, tile_tokens=TILE
    )
    return combine(outputs.view(*expert_ids.shape, HIDDEN), shared, expert_ids)


@pytest.mark.parametrize(
    ("placement", "activations", "form"),
    [
        ("dealt", "bf16", "bf16"),
        ("dealt", "fp8", "fp4"),
        ("copies", "fp8", "fp8"),
        ("copies", "fp4", "bf16"),
        ("uneven", "fp8", "bf16"),
        ("uneven", "fp4", "fp4"),
    ],
)
def test_equal_to_one_rank_bit_for_bit(placement, activations, form):
    counts, capacity = (2, 0, 5), 6
    case = Case("random", sum(counts), DEMO).make(9, torch.bfloat16)
    case["expert_ids"][1, 1] = -1
    x, ids, routing, limit = case["x"], case["expert_ids"], case["weights"], case["limit"]
    shared = x.flip(0) * 0.25
    everything = [stored(case, name, list(range(NUM_EXPERTS)), form) for name in ("w13", "w2")]
    expected = on_one_rank(x, ids, routing, *everything, shared, limit=limit, activations=activations)
    experts = PLACEMENTS[placement]
    weights = [[stored(case, name, mine, form) for name in ("w13", "w2")] for mine in experts]
    ranks = make_ranks(experts, RowFormat(HIDDEN, TOP_K, activations), capacity)
    tokens = list(zip(*(value.split(counts) for value in (x, ids, routing)), strict=True))
    for turn in range(2):  # the second call finds what the first left
        found = run(ranks, tokens, shared.split(counts), weights, limit, capacity)
        assert torch.equal(torch.cat(found), expected), turn
        tokens, counts = tokens[::-1], counts[::-1]  # other ranks have the tokens then
        expected = torch.cat(expected.split(counts[::-1])[::-1])
        shared = torch.cat(shared.split(counts[::-1])[::-1])


def test_traffic_is_what_exchange_counts_by_hand():
    experts = PLACEMENTS["copies"]
    form = RowFormat(HIDDEN, TOP_K, "fp8")
    case = Case("random", 5, DEMO).make(10, torch.bfloat16)
    ranks = make_ranks(experts, form, 4)
    counts = (4, 0, 1)
    tokens = list(zip(*(case[name].split(counts) for name in ("x", "expert_ids", "weights")), strict=True))
    weights = [[stored(case, name, mine, "fp8") for name in ("w13", "w2")] for mine in experts]
    run(ranks, tokens, case["x"].split(counts), weights, 1.0, 4)
    targets = [ranks[0].experts.targets(one[1], rank)[0] for rank, one in enumerate(tokens)]
    for rank, owner in enumerate(ranks):
        rows = sum(len(set(row) - {rank}) for row in targets[rank].tolist())
        pairs = int(((targets[rank] >= 0) & (targets[rank] != rank)).sum())
        assert owner.traffic.dispatch_bytes == rows * (HIDDEN + HIDDEN // 128 + 4 * TOP_K)
        assert owner.traffic.combine_bytes == pairs * 2 * HIDDEN
        assert owner.traffic.count_bytes == 2 * 4 * 4 * TOP_K
    assert sum(owner.traffic.combine_bytes for owner in ranks) > 0


@pytest.mark.parametrize(("activations", "form"), [("fp8", "bf16"), ("fp8", "fp8"), ("fp4", "fp4")])
def test_all_to_all_with_the_gpu_weights(tmp_path, activations, form):
    """The same kernels behind all_to_all_single, with one rank."""
    case = Case("random", 5, DEMO).make(12, torch.bfloat16)
    given = {"x": case["x"], "expert_ids": case["expert_ids"], "weights": case["weights"], "shared": case["x"] * 0.5}
    given |= {name: stored(case, name, list(range(NUM_EXPERTS)), form) for name in ("w13", "w2")}
    options = {"limit": case["limit"], "activations": activations}
    with process_group(Rank(0, 1, 0), tmp_path / "store") as group:
        parallel = ExpertParallel(group, ExpertMap.build([range(NUM_EXPERTS)], NUM_EXPERTS))
        assert torch.equal(parallel.add_routed(**given, **options, tile_tokens=TILE), on_one_rank(**given, **options))
    assert parallel.traffic.total_bytes == 0


@pytest.mark.parametrize("capacity", [2, 5])
def test_a_capacity_that_does_not_fit(capacity):
    case = Case("random", 3, DEMO).make(11, torch.bfloat16)
    (owner, *_) = make_ranks(PLACEMENTS["dealt"], RowFormat(HIDDEN, TOP_K, "fp8"), 4)
    with pytest.raises(ValueError, match=f"3 tokens, capacity {capacity}; expected"):
        Step(owner, case["x"], case["expert_ids"], case["weights"], capacity)
