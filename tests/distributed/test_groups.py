"""Who a process is among the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dsv4serve.distributed.groups import Rank, process_group
from dsv4serve.types import ConfigError


def test_a_process_alone_is_the_only_rank() -> None:
    assert Rank.from_environment({}) == Rank(0, 1, 0)


def test_ranks_as_torchrun_names_them() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}
    assert Rank.from_environment(environment) == Rank(5, 8, 1)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "'1', None, None; expected three numbers"),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "'one', '2', '0'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "rank 2, local 0 of 2: expected"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "rank 0, local 1 of 2: expected"),
    ],
)
def test_wrong_variables_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rank.from_environment(environment)


def test_a_group_of_one_lasts_as_long_as_its_context(tmp_path: Path) -> None:
    with process_group(Rank(0, 1, 0), tmp_path / "store"):
        value = torch.ones(3)
        dist.all_reduce(value)
        assert value.tolist() == [1.0] * 3
    assert not dist.is_initialized()
