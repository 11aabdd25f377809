"""Processes that run expert parallelism together: gloo, one thread each, sockets on loopback."""

import os
from pathlib import Path

import psutil
import torch
import torch.multiprocessing

from dsv4_kernels.mega_moe.parallel import ExpertMap, ExpertParallel
from dsv4serve.distributed.groups import Rank, process_group


def run_ranks(folder: Path, num_ranks: int, scenarios: dict) -> list[dict]:
    """Of each rank: the output and traffic of each scenario by name, and "listening", where its sockets listen.

    A scenario has "experts" (of each rank), "num_experts", "options" of `mega_moe`, "weights" with all experts, and
    "tokens", the other arguments of each rank.
    """
    torch.save(scenarios, folder / "scenarios.pt")
    torch.multiprocessing.spawn(_work, (folder, num_ranks), nprocs=num_ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _work(rank: int, folder: Path, num_ranks: int) -> None:
    torch.set_num_threads(1)
    scenarios = torch.load(folder / "scenarios.pt", weights_only=False)
    results = {}
    with process_group(Rank(rank, num_ranks, rank), folder / "store") as group:
        for name, scenario in scenarios.items():
            parallel = ExpertParallel(group, ExpertMap.build(scenario["experts"], scenario["num_experts"]))
            mine = list(scenario["experts"][rank])
            weights = {
                key: value if key.startswith("shared") else value[mine] for key, value in scenario["weights"].items()
            }
            output = parallel.mega_moe(**scenario["tokens"][rank], **weights, **scenario["options"])
            results[name] = (output, parallel.traffic)
        connections = psutil.Process(os.getpid()).net_connections()
        results["listening"] = [one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN]
    torch.save(results, folder / f"{rank}.pt")
