"""Which rank holds which experts: measured loads spread over ranks, more than one copy of hot experts. No torch.

Copies first: each spare slot goes to the expert whose copies have most to do. Then LPT (longest processing time): the
copy with most to do goes to the rank with least, among those that have a free slot and no copy of this expert. Both are
greedy; a test holds the result to a bound that any placement has.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

Placement = tuple[tuple[int, ...], ...]  # expert ids of each rank, ascending: the slots of its weights


def place_experts(loads: Sequence[float], num_ranks: int, slots_per_rank: int) -> Placement:
    """Experts of each rank: every expert once or more, at most once on a rank, at most `slots_per_rank` on one.

    Args:
        loads: of each expert, in any unit, such as tokens of the last minutes; all zero is an even load.

    Raises ValueError where the slots cannot hold all experts, or a load is negative or not finite.
    """
    if num_ranks < 1 or num_ranks * slots_per_rank < len(loads) or not loads:
        raise ValueError(
            f"place_experts: {num_ranks} ranks of {slots_per_rank} slots for {len(loads)} experts; "
            "expected at least one expert, and as many slots as experts"
        )
    wrong = [(expert, load) for expert, load in enumerate(loads) if not (math.isfinite(load) and load >= 0)]
    if wrong:
        raise ValueError(f"place_experts: the load of expert {wrong[0][0]} is {wrong[0][1]}; allowed are 0 and above")
    copies = _count_copies(loads, num_ranks, num_ranks * slots_per_rank)
    shares = [load / count for load, count in zip(loads, copies, strict=True)]
    ranks: list[set[int]] = [set() for _ in range(num_ranks)]
    work = [0.0] * num_ranks

    for expert in sorted(range(len(loads)), key=lambda one: -shares[one]):
        for _ in range(copies[expert]):
            free = [
                rank for rank in range(num_ranks) if len(ranks[rank]) < slots_per_rank and expert not in ranks[rank]
            ]
            if not free:  # room only beside its other copies: a copy fewer
                break
            least = min(free, key=lambda rank: work[rank])
            ranks[least].add(expert)
            work[least] += shares[expert]
    return tuple(tuple(sorted(experts)) for experts in ranks)


def rank_loads(loads: Sequence[float], placement: Placement) -> list[float]:
    """What each rank has to do when the copies of an expert share its load evenly; in the unit of `loads`."""
    copies = [0] * len(loads)
    for experts in placement:
        for expert in experts:
            copies[expert] += 1
    return [sum(loads[expert] / copies[expert] for expert in experts) for experts in placement]


def _count_copies(loads: Sequence[float], most: int, num_slots: int) -> list[int]:
    """Copies of each expert, 1 to `most`, together at most `num_slots`; experts without load get no second one."""
    copies = [1] * len(loads)
    heap = [(-load, expert) for expert, load in enumerate(loads) if load > 0 and most > 1]
    heapq.heapify(heap)
    for _ in range(num_slots - len(loads)):
        if not heap:
            break
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        if copies[expert] < most:
            heapq.heappush(heap, (-loads[expert] / copies[expert], expert))
    return copies
