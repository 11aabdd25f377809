"""Who this process is among the ranks, and the process group that its collectives run in: gloo on CPU, NCCL on GPU.

Nothing listens off loopback unless the operator says so: ranks find each other through a file, whose folder only they
can read, and the libraries' own sockets are on `lo`. For ranks on several hosts set GLOO_SOCKET_IFNAME and
NCCL_SOCKET_IFNAME to the interface between them, and put the file where all of them see it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dsv4serve.types import ConfigError

TIMEOUT_S = 120.0  # of a collective: a rank that is gone ends the others instead of keeping them
SOCKET_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Rank:
    """One process of `world_size`; `local` counts on its host and is the number of its GPU."""

    rank: int
    world_size: int
    local: int

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local <= self.rank):
            raise ConfigError(
                f"rank {self.rank}, local {self.local} of {self.world_size}: expected 0 <= local <= rank < world size"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """From RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; the only rank without any of them."""
        values = [environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        if not any(values):
            return cls(0, 1, 0)
        try:
            return cls(*(int(value or "") for value in values))
        except ValueError:
            raise ConfigError(
                "RANK, WORLD_SIZE and LOCAL_RANK are "
                + ", ".join(repr(value) for value in values)
                + "; expected three numbers, or none of the variables"
            ) from None


@contextmanager
def process_group(rank: Rank, store: Path, device: str = "cpu", timeout_s: float = TIMEOUT_S) -> Iterator[object]:
    """The group of all ranks while the context lasts; its members leave it together.

    Args:
        store: a file that does not exist yet, the same for all ranks.
        device: "cpu" or "cuda"; a rank uses the GPU of its local number, which becomes the current one.
    """
    for name in SOCKET_VARIABLES:
        os.environ.setdefault(name, "lo")
    more = {}
    if device == "cuda":
        torch.cuda.set_device(rank.local)
        more["device_id"] = torch.device("cuda", rank.local)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.FileStore(str(store), rank.world_size),
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=timeout_s),
        **more,
    )
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
