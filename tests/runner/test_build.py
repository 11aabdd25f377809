"""What a configuration builds, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.models import BASE

from dsv4serve.config import EngineConfig, LoadFormat, Numerics
from dsv4serve.runner import build_runner
from dsv4serve.runner.sentinel import Sentinel
from dsv4serve.types import ConfigError


def config(tmp_path: Path, changes: dict, **settings) -> EngineConfig:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **changes}))
    fixed = {
        "load_format": LoadFormat.DUMMY,
        "numerics": Numerics.EXACT,
        "cache_bytes": 8 << 20,
        "max_running_requests": 2,
    }
    return EngineConfig(model=tmp_path, **{**fixed, **settings})


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_drafts_get_their_room_and_only_where_they_are_asked_for(tmp_path: Path, num_draft_tokens: int) -> None:
    runner = build_runner(config(tmp_path, {}, num_draft_tokens=num_draft_tokens))
    layout = runner.pools.layout
    assert layout.num_draft_tokens == num_draft_tokens
    assert len(layout.layers) == BASE["num_hidden_layers"] + (num_draft_tokens > 0)
    assert (runner._chain is not None) == (num_draft_tokens > 0)


def test_drafts_of_a_model_without_an_mtp_block_are_refused(tmp_path: Path) -> None:
    changes = {"num_nextn_predict_layers": 0, "compress_ratios": BASE["compress_ratios"][:-1]}
    with pytest.raises(ConfigError, match=r"num_draft_tokens is 2, but .* has no MTP block .*; use 0"):
        build_runner(config(tmp_path, changes, num_draft_tokens=2))
    assert build_runner(config(tmp_path, changes)).num_slots == 2


def test_the_sentinel_is_there_only_on_demand(tmp_path: Path) -> None:
    assert build_runner(config(tmp_path, {}))._observer is None
    assert isinstance(build_runner(config(tmp_path, {}, check_numerics=True))._observer, Sentinel)
