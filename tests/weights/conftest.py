"""A tiny quantised checkpoint with every kind of tensor, as one file and as shards; copies may be damaged."""

import functools
import json
import shutil
from pathlib import Path

import pytest
from support.models import BASE

from dsv4serve.config import ModelConfig
from dsv4serve.weights import dummy_weights, write_checkpoint
from dsv4serve.weights.export import exported_config
from dsv4serve.weights.layout import official_view

RAW = {
    **BASE,
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0],
    "num_hash_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "index_n_heads": 16,  # with few heads many index scores are exactly 0, and how a tie breaks is nobody's contract
    "index_head_dim": 128,
    "n_routed_experts": 3,
    "moe_intermediate_size": 128,
    "hc_mult": 2,
}
SHARD_BYTES = 200_000


@pytest.fixture(scope="session")
def model() -> ModelConfig:
    """The quantised config."""
    return ModelConfig.from_dict(exported_config(RAW, quantized=True))


@pytest.fixture(scope="session")
def weights(model):
    """Random runtime tensors of the config."""
    return dummy_weights(model, 7)


def _write(directory: Path, weights, max_shard_bytes: int) -> Path:
    write_checkpoint(directory, RAW, functools.partial(official_view, weights), True, max_shard_bytes)
    return directory


@pytest.fixture(scope="session")
def single(tmp_path_factory, weights) -> Path:
    """One model.safetensors; read only."""
    return _write(tmp_path_factory.mktemp("checkpoint") / "single", weights, 1 << 30)


@pytest.fixture(scope="session")
def sharded(tmp_path_factory, weights) -> Path:
    """Several shards and an index; read only."""
    return _write(tmp_path_factory.mktemp("checkpoint") / "sharded", weights, SHARD_BYTES)


class Damage:
    """A copy of a checkpoint and the ways to break it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index_path = directory / "model.safetensors.index.json"

    def shard_of(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        if not self.index_path.exists():
            return self.directory / "model.safetensors"
        return self.directory / json.loads(self.index_path.read_text())["weight_map"][name]

    def edit_header(self, path: Path, change) -> None:
        """Rewrite the header of `path` after `change(header)`; the data stays."""
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    def edit_index(self, change) -> None:
        """Rewrite the weight map after `change(weight_map)`."""
        index = json.loads(self.index_path.read_text())
        change(index["weight_map"])
        self.index_path.write_text(json.dumps(index))

    def write_values(self, name: str, data: bytes) -> None:
        """Overwrite the first bytes of a tensor."""
        path = self.shard_of(name)
        raw = bytearray(path.read_bytes())
        length = int.from_bytes(raw[:8], "little")
        begin = 8 + length + json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
        raw[begin : begin + len(data)] = data
        path.write_bytes(raw)


@pytest.fixture
def damage(tmp_path, sharded) -> Damage:
    """A sharded checkpoint to break."""
    return Damage(Path(shutil.copytree(sharded, tmp_path / sharded.name)))


@pytest.fixture
def damage_single(tmp_path, single) -> Damage:
    """A one-file checkpoint to break."""
    return Damage(Path(shutil.copytree(single, tmp_path / single.name)))
