"""Time of expert parallelism over the GPUs of one host, and a timeline of it.

    torchrun --standalone --nproc-per-node 2 -m dsv4_kernels.mega_moe.bench_parallel OUT.jsonl TIMELINE_FOLDER

All layers of Pro are alike: one of them, its 384 experts dealt to the ranks, 1 to 4,096 tokens a rank, routed evenly.
- "all_to_all": dispatch, products and combine one after the other, with the host between (exchange.py);
- "symmetric": writes into each other's memory, one operation (symmetric.py), the way back inside the second product;
- "symmetric graph": the same as a CUDA graph, as a decode step runs it.
`products_us` is the products alone on the rows that came, as a graph: what is above it is communication that shows.
`wire_bytes` is what this rank's tokens took in a call, out and back. The time of a call is that of the slowest rank.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv4_kernels.benching import Measured, copy_rate, matmul_rate, write_lines
from dsv4_kernels.cases import PRO
from dsv4_kernels.mega_moe.bench import routed_bytes, routed_flops
from dsv4_kernels.mega_moe.cases import packed_weight, routed_tokens
from dsv4_kernels.mega_moe.parallel import ExpertMap, ExpertParallel, Traffic
from dsv4_kernels.mega_moe.parallel.symmetric import Step, symmetric_experts
from dsv4_kernels.mega_moe.parallel.wire import RowFormat
from dsv4_kernels.mega_moe.reference import Activations
from dsv4_kernels.mega_moe.triton import choose_tile, pair_outputs
from dsv4_kernels.mega_moe.weights import Fp4Weight, form_for, relayout

TOKENS = (1, 8, 64, 512, 4096)  # a rank
OTHERS = 512  # tokens for which the other activations are timed too
TIMELINE = 2048  # tokens of the timeline
WARM_UPS, CALLS = 3, 15  # fixed, because all ranks must make as many


def timed_us(call: Callable[[], object]) -> float:
    """Median over calls, each begun by all ranks together, of the slowest rank's time."""
    times = []
    for _ in range(WARM_UPS + CALLS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        begin.record()
        call()
        end.record()
        end.synchronize()
        slowest = torch.tensor(begin.elapsed_time(end) * 1e3, device="cuda")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times.append(float(slowest))
    return median(times[WARM_UPS:])


def make_weights(activations: Activations) -> dict[str, Fp4Weight]:
    """Of a rank's experts."""
    random = torch.Generator("cuda").manual_seed(dist.get_rank())
    num_experts = len(range(dist.get_rank(), PRO.n_routed_experts, dist.get_world_size()))
    form = form_for(activations, torch.cuda.get_device_capability()[0])
    width, hidden = PRO.moe_intermediate_size, PRO.hidden_size
    shapes = {"w13": (2 * width, hidden), "w2": (hidden, width)}
    packed = {name: packed_weight(random, num_experts, *shape) for name, shape in shapes.items()}
    return {name: relayout(*stored, form=form) for name, stored in packed.items()}


class Layer:
    """One layer's experts over all ranks, in both forms."""

    def __init__(self, weights: dict[str, Fp4Weight], activations: Activations) -> None:
        group, num_experts = dist.group.WORLD, PRO.n_routed_experts
        assert group is not None
        dealt = [range(rank, num_experts, group.size()) for rank in range(group.size())]
        form = RowFormat(PRO.hidden_size, PRO.num_experts_per_tok, activations)
        self.weights, self.activations = weights, activations
        self.exchange = ExpertParallel(group, ExpertMap.build(dealt, num_experts, "cuda"))
        self.symmetric = symmetric_experts(group, dealt, num_experts, form, max(TOKENS))

    def calls(self, tokens: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
        """What is timed, by implementation."""
        num_tokens = len(tokens["x"])
        given = tokens | self.weights | {"limit": PRO.swiglu_limit}
        return {
            "all_to_all": lambda: self.exchange.add_routed(**given, activations=self.activations),
            "symmetric": lambda: self.symmetric.add_routed(**given, capacity=num_tokens),
        }

    def products(self, tokens: dict[str, Tensor]) -> Callable[[], object]:
        """The products of the rows that one call brings, whose outputs stay here."""
        inputs = [tokens[name] for name in ("x", "expert_ids", "weights")]
        step = Step(self.symmetric, *inputs, len(tokens["x"]))
        step.dispatch()
        self.symmetric.memory.barrier()
        rows = step.received(self.weights["w13"].form)
        num_slots, (num_rows, top_k) = PRO.n_routed_experts, rows[2].shape
        tile = choose_tile(num_rows, top_k, num_slots, self.weights["w13"].form)
        weights, activations = (self.weights["w13"], self.weights["w2"]), self.activations
        return lambda: pair_outputs(*rows, *weights, limit=PRO.swiglu_limit, activations=activations, tile_tokens=tile)

    def sent_bytes(self, name: str, call: Callable[[], object]) -> int:
        """By this rank in one call."""
        owner = self.exchange if name == "all_to_all" else self.symmetric
        before: Traffic = owner.traffic
        so_far = before.total_bytes
        call()
        return owner.traffic.total_bytes - so_far


def as_graph(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph; it has run before."""
    graph = torch.cuda.CUDAGraph()
    dist.barrier()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    """One line a measurement; graphs of exchanges last, because they need most of the library."""
    later = []
    for activations in ("fp8", "fp4", "bf16"):
        layer = Layer(make_weights(activations), activations)
        for num_tokens in TOKENS if activations == "fp8" else (OTHERS,):
            tokens = routed_tokens(torch.Generator("cuda").manual_seed(dist.get_rank()), num_tokens, PRO)
            products = layer.products(tokens)
            products()  # compiles
            products_us = timed_us(as_graph(products))
            for name, call in layer.calls(tokens).items():
                yield line(
                    layer,
                    f"{name} {activations}",
                    num_tokens,
                    timed_us(call),
                    layer.sent_bytes(name, call),
                    products_us,
                )
                if name.startswith("symmetric") and activations == "fp8":
                    later.append((layer, name, num_tokens, call, products_us))
        if activations == "fp8":
            timeline(layer, folder)
    for layer, name, num_tokens, call, products_us in later:
        sent = layer.sent_bytes(name, call)
        yield line(layer, f"{name} graph fp8", num_tokens, timed_us(as_graph(call)), sent, products_us)


def line(layer: Layer, name: str, num_tokens: int, us: float, sent: int, products_us: float) -> dict[str, Any]:
    """Of one measurement. Bytes and FLOPs are a rank's: all ranks have as many tokens, and each some of the experts."""
    num_ranks, num_pairs = dist.get_world_size(), num_tokens * PRO.num_experts_per_tok * dist.get_world_size()
    mine = PRO.n_routed_experts / num_ranks
    num_hit = round(mine * (1 - (1 - 1 / PRO.n_routed_experts) ** num_pairs))  # of evenly drawn experts, about
    moved = routed_bytes(PRO, num_hit) + 3 * 2 * num_tokens * PRO.hidden_size  # x, the shared output, the sum
    measured = Measured(us, moved, routed_flops(PRO, num_tokens), copy_rate(), matmul_rate("bf16"))
    return measured.as_line(
        op="mega_moe_parallel",
        implementation=name,
        shapes="pro",
        num_tokens=num_tokens,
        num_ranks=num_ranks,
        products_us=round(products_us, 2),
        wire_bytes=sent,
        wire_gb_per_s=round(sent / us * 1e-3, 1),
    )


def timeline(layer: Layer, folder: Path) -> None:
    """Chrome traces of one call of each form, of rank 0."""
    tokens = routed_tokens(torch.Generator("cuda").manual_seed(9), TIMELINE, PRO)
    for name, call in layer.calls(tokens).items():
        call()
        dist.barrier()
        with torch.profiler.profile() as profile:
            call()
            torch.cuda.synchronize()
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(folder / f"{name.replace(', ', '-').replace(' ', '-')}.json"))


def main() -> None:
    """See the module's docstring."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    found = lines(Path(sys.argv[2]))
    if dist.get_rank() == 0:
        write_lines(found)
    else:
        for _ in found:
            pass
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
