"""Which rank and which of its slots a (token, expert) pair goes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertMap:
    """Where the copies of each expert are; made by `build`.

    A rank's weights are stacked by slot: slot s of rank r holds expert `experts[r][s]`.
    """

    experts: tuple[tuple[int, ...], ...]
    ranks: Tensor  # int64 [E, most copies]; behind an expert's last copy they repeat
    slots: Tensor  # int64 [E, most copies]
    num_copies: Tensor  # int64 [E]

    @classmethod
    def build(cls, experts: Sequence[Sequence[int]], num_experts: int, device: torch.device | str = "cpu") -> ExpertMap:
        """From the expert ids of each rank in the order of its weights.

        Raises ValueError where an expert is nowhere, twice on a rank, or not one of 0 .. num_experts - 1.
        """
        places: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
        for rank, mine in enumerate(experts):
            if len(set(mine)) < len(mine) or not all(0 <= expert < num_experts for expert in mine):
                raise ValueError(
                    f"ExpertMap: rank {rank} has the experts {list(mine)}; expected different ones of 0 .. "
                    f"{num_experts - 1}"
                )
            for slot, expert in enumerate(mine):
                places[expert].append((rank, slot))
        missing = [expert for expert, found in enumerate(places) if not found]
        if missing:
            raise ValueError(f"ExpertMap: no rank has the experts {missing}")
        most = max(map(len, places))
        table = torch.tensor([[found[copy % len(found)] for copy in range(most)] for found in places], device=device)
        ranks, slots = table.unbind(-1)
        counts = torch.tensor([len(found) for found in places], device=device)
        return cls(tuple(tuple(mine) for mine in experts), ranks.contiguous(), slots.contiguous(), counts)

    @property
    def num_ranks(self) -> int:
        """Ranks, those without experts too."""
        return len(self.experts)

    def targets(self, expert_ids: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Rank and slot int64 [T, K] of each pair of this rank's tokens; -1 where the expert is -1.

        Copies take turns by the token's row, shifted by the rank so that first rows do not all meet at first copies:
        nothing but the batch decides, and the copies of an expert get the same number of a rank's tokens, give or take
        how they are routed. A copy on the token's own rank is not preferred: planned loads assume equal shares.
        """
        there = expert_ids >= 0
        expert = expert_ids.clamp_min(0).long()
        row = torch.arange(len(expert_ids), device=expert_ids.device).unsqueeze(1)
        copy = (row + rank) % self.num_copies[expert]
        ranks, slots = self.ranks[expert, copy], self.slots[expert, copy]
        return ranks.masked_fill(~there, -1), slots.masked_fill(~there, -1)
