"""Expert parallelism over real GPUs against one GPU with all experts, bit for bit. Two ranks or more, one GPU each:

    torchrun --standalone --nproc-per-node 2 -m pytest --confcutdir=tests/gpu tests/gpu/test_parallel.py

Every rank runs every test, makes the tokens and weights of all, and judges its own part.
"""

import dataclasses
import os

import pytest
import torch
import torch.distributed as dist

from dsv4_kernels.cases import DEMO, FLASH, PRO
from dsv4_kernels.mega_moe import triton as moe
from dsv4_kernels.mega_moe.cases import packed_weight, routed_tokens
from dsv4_kernels.mega_moe.combine import combine
from dsv4_kernels.mega_moe.parallel import ExpertMap, ExpertParallel
from dsv4_kernels.mega_moe.parallel.symmetric import symmetric_experts
from dsv4_kernels.mega_moe.parallel.wire import RowFormat
from dsv4_kernels.mega_moe.weights import form_for, relayout

NUM_EXPERTS, TILE, CAPACITY = 12, 32, 64
SHAPES = {name: dataclasses.replace(sizes, n_routed_experts=NUM_EXPERTS) for name, sizes in
          {"pro": PRO, "flash": FLASH, "demo": DEMO}.items()}  # fmt: skip
ACTIVATIONS = ("bf16", "fp8", "fp4")


@pytest.fixture(scope="module")
def group():
    """All ranks."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=SHAPES)
def layer(request, group):
    """(sizes, codes and scales of both weights)."""
    sizes, random = SHAPES[request.param], torch.Generator("cuda").manual_seed(1)
    width, hidden = sizes.moe_intermediate_size, sizes.hidden_size
    return sizes, [packed_weight(random, NUM_EXPERTS, *shape) for shape in ((2 * width, hidden), (hidden, width))]


def placement(num_ranks):
    """Dealt, and expert 0 everywhere."""
    return [sorted({0, *range(rank, NUM_EXPERTS, num_ranks)}) for rank in range(num_ranks)]


def weights_of(layer, mine, form):
    return [relayout(codes[mine].contiguous(), scale[mine], form=form) for codes, scale in layer[1]]


def forms(activations):
    """The weights' forms that this GPU runs."""
    return sorted({"bf16", form_for(activations, torch.cuda.get_device_capability()[0])})


def tokens_of(layer, num_ranks, seed, hot=False):
    """The tokens of every rank: as many as fit, none, some."""
    counts = [(CAPACITY, 0, 5, 33)[(rank + seed) % 4] for rank in range(num_ranks)]
    random = torch.Generator("cuda").manual_seed(seed)
    many = [routed_tokens(random, count, layer[0]) for count in counts]
    if hot:
        for one in many:
            one["expert_ids"][:, 1:] = -1
            one["expert_ids"][:, 0] = 0
    return many


def expected_of(layer, many, options, form, rank):
    """This rank's part of what one GPU with all experts says to the tokens of all."""
    everything = {key: torch.cat([one[key] for one in many]) for key in many[0]}
    w13, w2 = weights_of(layer, list(range(NUM_EXPERTS)), form)
    x, ids = everything["x"], everything["expert_ids"]
    inputs = moe.rounded_inputs(x, options["activations"], form)
    outputs = moe.pair_outputs(*inputs, ids, everything["weights"], w13, w2, **options, tile_tokens=TILE)
    outputs = combine(outputs.view(*ids.shape, x.shape[1]), everything["shared"], ids)
    return outputs.split([len(one["x"]) for one in many])[rank]


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_all_to_all_equals_one_gpu(group, layer, activations):
    rank, options = group.rank(), {"limit": layer[0].swiglu_limit, "activations": activations}
    experts = placement(group.size())
    parallel = ExpertParallel(group, ExpertMap.build(experts, NUM_EXPERTS, "cuda"))
    for weight_form in forms(activations):
        w13, w2 = weights_of(layer, experts[rank], weight_form)
        for seed in range(3):
            many = tokens_of(layer, group.size(), seed, hot=seed == 2)
            found = parallel.add_routed(**many[rank], w13=w13, w2=w2, **options, tile_tokens=TILE)
            assert torch.equal(found, expected_of(layer, many, options, weight_form, rank)), seed
    assert parallel.traffic.combine_bytes > 0


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_writes_into_peers_equal_one_gpu(group, layer, activations):
    rank, sizes = group.rank(), layer[0]
    experts = placement(group.size())
    form = RowFormat(sizes.hidden_size, sizes.num_experts_per_tok, activations)
    parallel = symmetric_experts(group, experts, NUM_EXPERTS, form, CAPACITY)
    exchange = ExpertParallel(group, ExpertMap.build(experts, NUM_EXPERTS, "cuda"))
    options = {"limit": sizes.swiglu_limit, "activations": activations}
    call = {"limit": sizes.swiglu_limit, "capacity": CAPACITY, "tile_tokens": TILE}
    for weight_form in forms(activations):
        w13, w2 = weights_of(layer, experts[rank], weight_form)
        for seed in range(4):  # each call finds what the last one left
            many = tokens_of(layer, group.size(), seed, hot=seed == 2)
            found = parallel.add_routed(**many[rank], w13=w13, w2=w2, **call)
            assert torch.equal(found, expected_of(layer, many, options, weight_form, rank)), seed
            exchange.add_routed(**many[rank], w13=w13, w2=w2, **options)
    assert parallel.traffic.combine_bytes == exchange.traffic.combine_bytes > 0


def test_replays_of_a_graph_follow_their_inputs(group, layer):
    rank, sizes = group.rank(), layer[0]
    experts = placement(group.size())
    form = RowFormat(sizes.hidden_size, sizes.num_experts_per_tok, "fp8")
    parallel = symmetric_experts(group, experts, NUM_EXPERTS, form, CAPACITY)
    w13, w2 = weights_of(layer, experts[rank], True)
    call = {"limit": sizes.swiglu_limit, "capacity": CAPACITY, "tile_tokens": TILE}
    options = {"limit": sizes.swiglu_limit, "activations": "fp8"}
    random = torch.Generator("cuda").manual_seed(7)
    first, *others = ([routed_tokens(random, 24, sizes) for _ in range(group.size())] for _ in range(4))
    given = {key: value.clone() for key, value in first[rank].items()}
    parallel.add_routed(**given, w13=w13, w2=w2, **call)  # compiles
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = parallel.add_routed(**given, w13=w13, w2=w2, **call)
    for many in others:
        for key, value in given.items():
            value.copy_(many[rank][key])
        graph.replay()
        assert torch.equal(out, expected_of(layer, many, options, True, rank))
