"""Expert parallelism by `all_to_all_single`: gloo on CPU, NCCL on GPU. Splits are known to the host, so it waits for
them; symmetric.py is the form without the host.

A token travels once to each rank that has experts of it, quantised, with its slots and weights. What comes back is one
row a pair, as the expert said it, in the tokens' dtype: sums are made where the token lives, in the order of expert
ids, float32, rounded once, which is what one rank with all experts does. Sums by rank would be fewer bytes and another
order.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from dsv4_kernels.mega_moe import reference
from dsv4_kernels.mega_moe.parallel.expert_map import ExpertMap
from dsv4_kernels.mega_moe.parallel.wire import RowFormat
from dsv4_kernels.mega_moe.reference import Activations, check_activations, combine, sort_pairs
from dsv4_kernels.mega_moe.weights import Fp4Weight

COUNTED = 2  # numbers that ranks tell each other first: rows and pairs


def _triton() -> ModuleType:
    """The GPU kernels; no CPU needs Triton."""
    from dsv4_kernels.mega_moe import triton

    return triton


@dataclass
class Traffic:
    """Bytes that this rank's tokens took: out to other ranks, and back from there. What stays on it is no traffic."""

    num_calls: int = 0
    count_bytes: int = 0
    dispatch_bytes: int = 0
    combine_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Of all calls."""
        return self.count_bytes + self.dispatch_bytes + self.combine_bytes


class ExpertParallel:
    """The experts over the ranks of a process group.

    `traffic` counts all calls. Every rank calls the same operation with the same arguments but its own tokens and
    weights, with no tokens too.
    """

    def __init__(self, group: dist.ProcessGroup, experts: ExpertMap) -> None:
        if group.size() != experts.num_ranks:
            raise ValueError(f"ExpertParallel: the map has {experts.num_ranks} ranks, the group {group.size()}")
        self.group, self.experts = group, experts
        self.traffic = Traffic()

    def mega_moe(
        self,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        w13: Tensor,
        w2: Tensor,
        shared_w13: Tensor,
        shared_w2: Tensor,
        *,
        limit: float,
        activations: Activations,
        quantize_shared: bool | None = None,
    ) -> Tensor:
        """`reference.mega_moe` where w13 and w2 are those of this rank's slots, and the shared expert is everywhere."""
        check_activations(activations)
        quantize = activations != "bf16" if quantize_shared is None else quantize_shared
        shared = reference.shared_expert(x, shared_w13, shared_w2, limit=limit, quantize=quantize)
        return self.add_routed(shared, x, expert_ids, weights, w13, w2, limit=limit, activations=activations)

    def add_routed(
        self,
        shared: Tensor,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        w13: Tensor | Fp4Weight,
        w2: Tensor | Fp4Weight,
        *,
        limit: float,
        activations: Activations,
        tile_tokens: int | None = None,
    ) -> Tensor:
        """`mega_moe` given the output of the shared expert [T, D].

        Args:
            expert_ids: [T, K], numbers of the whole model, -1 for none. On a GPU a row without any is not written.
            w13, w2: of this rank's slots; tensors [slots, 2I, D] and [slots, D, I], or `Fp4Weight` on a GPU.
            tile_tokens: on a GPU, as in `triton.mega_moe`: with one value the bits do not depend on the other tokens.

        Raises ValueError where the weights are not those of the map.
        """
        num_slots = len(self.experts.experts[self.group.rank()])
        held = w13.num_experts if isinstance(w13, Fp4Weight) else len(w13)
        if held != num_slots:
            raise ValueError(f"ExpertParallel: w13 has {held} experts, the map gives this rank {num_slots}")
        top_k = expert_ids.shape[1]
        form = RowFormat(x.shape[1], top_k, activations, x.dtype)
        ranks, slots = self.experts.targets(expert_ids, self.group.rank())
        goes = torch.zeros(len(x), self.experts.num_ranks + 1, dtype=torch.bool, device=x.device)
        goes.scatter_(1, ranks.masked_fill(ranks < 0, self.experts.num_ranks), True)
        rank, token = goes[:, :-1].t().nonzero(as_tuple=True)  # of each row that travels
        row_slots = slots[token].masked_fill(ranks[token] != rank.unsqueeze(1), -1)
        row, place = (row_slots >= 0).nonzero(as_tuple=True)  # of each pair, in the order of the rows
        counts = torch.stack([torch.bincount(some, minlength=self.experts.num_ranks) for some in (rank, rank[row])], 1)
        values, scales = form.quantize(x)
        rows = form.pack(values[token], scales[token], row_slots, weights[token])

        (rows_out, pairs_out), (rows_in, pairs_in) = self._exchange_counts(counts)
        received = self._exchange(rows, rows_out, rows_in)
        said = self._said(form, received, w13, w2, limit, tile_tokens)
        said = self._exchange(said, pairs_in, pairs_out)
        self._count(rows_out, form.row_bytes, pairs_out, x.shape[1] * x.element_size())

        outputs = torch.empty(len(x) * top_k, x.shape[1], dtype=x.dtype, device=x.device)
        outputs[token[row] * top_k + place] = said
        if isinstance(w13, Fp4Weight):
            return _triton().combine(outputs.view(*expert_ids.shape, x.shape[1]), shared, expert_ids)
        order = sort_pairs(expert_ids)
        return combine(shared, outputs[order], order // top_k)

    def _said(
        self,
        form: RowFormat,
        rows: Tensor,
        w13: Tensor | Fp4Weight,
        w2: Tensor | Fp4Weight,
        limit: float,
        tile_tokens: int | None,
    ) -> Tensor:
        """What this rank's experts say of the rows that came, one row a pair in the order of the rows."""
        values, scales, slots, weights = form.unpack(rows)
        pairs = (slots.flatten() >= 0).nonzero().flatten()
        options = {"limit": limit, "activations": form.activations}
        if isinstance(w13, Fp4Weight):
            inputs = (form.dequantize(values, scales), scales) if w13.form == "bf16" else (values, scales)
            tile = tile_tokens or _triton().choose_tile(len(pairs), 1, w13.num_experts, w13.form)
            return _triton().pair_outputs(*inputs, slots, weights, w13, w2, **options, tile_tokens=tile)[pairs]
        order, x = sort_pairs(slots), form.dequantize(values, scales)
        found = reference.expert_outputs(x, order, slots, weights, w13, w2, **options)
        said = torch.empty_like(found)
        said[torch.searchsorted(pairs, order)] = found
        return said

    def _exchange_counts(self, counts: Tensor) -> list[list[list[int]]]:
        """counts int64 [ranks, COUNTED] for each rank -> [sent, received][number][rank]."""
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        return torch.stack([counts, received]).transpose(1, 2).tolist()

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Rows [sum(sent), ..] in the order of ranks -> [sum(received), ..]."""
        result = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=self.group)
        return result

    def _count(self, rows: list[int], row_bytes: int, pairs: list[int], pair_bytes: int) -> None:
        mine = self.group.rank()
        self.traffic.num_calls += 1
        self.traffic.count_bytes += (len(rows) - 1) * COUNTED * 8
        self.traffic.dispatch_bytes += (sum(rows) - rows[mine]) * row_bytes
        self.traffic.combine_bytes += (sum(pairs) - pairs[mine]) * pair_bytes
