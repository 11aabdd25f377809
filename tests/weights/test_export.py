"""Export: official -> load -> official gives the same bytes, BF16 holds the same numbers, transformers reads it."""

import functools
import json
from pathlib import Path

import pytest
import torch
from support.models import oracle_logits, random_ids

from dsv4serve.cli.main import main
from dsv4serve.config import EngineConfig, ModelConfig, Numerics, default_model
from dsv4serve.model.transformer import Transformer
from dsv4serve.types import CheckpointError
from dsv4serve.weights import load_weights, verify, write_checkpoint
from dsv4serve.weights.layout import official_view


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def load(directory):
    return load_weights(EngineConfig(model=directory), ModelConfig.load(directory))


def write(directory, weights, config_of, **options):
    raw = json.loads((config_of / "config.json").read_text())
    write_checkpoint(directory, raw, functools.partial(official_view, weights), **options)
    return directory


@pytest.fixture(scope="module")
def official(tmp_path_factory, sharded):
    """A checkpoint whose values come from a checkpoint, so they are exactly representable."""
    return write(tmp_path_factory.mktemp("export") / "official", load(sharded), sharded, quantized=True)


def test_official_to_official_is_byte_identical(official, tmp_path):
    assert files(write(tmp_path / "again", load(official), official, quantized=True)) == files(official)


def test_quantising_again_changes_no_value(official, sharded):
    first, second = load(sharded), load(official)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_official_to_bf16_and_back_is_byte_identical(official, tmp_path):
    assert main(["convert", str(official), str(tmp_path / "bf16"), "--to", "bf16"]) == 0
    assert main(["convert", str(tmp_path / "bf16"), str(tmp_path / "back"), "--to", "official"]) == 0
    assert files(tmp_path / "back") == files(official)


def test_bf16_holds_the_same_numbers(official, tmp_path):
    assert main(["convert", str(official), str(tmp_path / "bf16"), "--to", "bf16"]) == 0
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "expert_dtype" not in config
    quantized, widened = load(official), load(tmp_path / "bf16")
    assert all(torch.equal(quantized[name], widened[name]) for name in quantized)


def test_shards_stay_below_the_limit_and_cover_everything(official, model, tmp_path):
    limit = 300_000
    directory = write(tmp_path / "shards", load(official), official, quantized=True, max_shard_bytes=limit)
    index = verify(directory, model)
    sizes: dict[str, int] = {}
    for name, file in index.files.items():
        sizes[file] = sizes.get(file, 0) + index.specs[name].num_bytes
    assert len(sizes) > 5
    assert max(sizes.values()) <= limit
    total = json.loads((directory / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == index.num_bytes == verify(official, model).num_bytes


def test_convert_brings_the_tokenizer_along(tmp_path):
    assert main(["convert", str(default_model()), str(tmp_path / "bf16"), "--to", "bf16"]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "bf16" / name).read_bytes() == (default_model() / name).read_bytes()


def test_an_existing_folder_is_not_overwritten(official, capsys):
    before = files(official)
    assert main(["convert", str(official), str(official), "--to", "bf16"]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert files(official) == before


def test_a_broken_source_writes_nothing(damage, tmp_path, capsys):
    damage.shard_of("head.weight").unlink()
    assert main(["convert", str(damage.directory), str(tmp_path / "out"), "--to", "bf16"]) == 2
    assert "shard is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_no_valid_checkpoint(tmp_path, sharded, weights):
    def read(name):
        if name.startswith("mtp"):
            raise CheckpointError("the disk is on fire")
        return official_view(weights, name)

    raw = json.loads((sharded / "config.json").read_text())
    with pytest.raises(CheckpointError, match="on fire"):
        write_checkpoint(tmp_path / "half", raw, read, quantized=True, max_shard_bytes=200_000)
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        ModelConfig.load(tmp_path / "half")


def test_transformers_loads_the_bf16_export_and_agrees(official, tmp_path):
    import transformers  # here: it takes seconds to import, and only this test needs it

    directory = tmp_path / "bf16"
    assert main(["convert", str(official), str(directory), "--to", "bf16"]) == 0
    network, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    network.eval().set_experts_implementation("eager")
    config = ModelConfig.load(directory)
    ids = random_ids(config, 150, 4)  # one C128 row and a sliding window of 16
    with torch.inference_mode():
        theirs = network(torch.tensor([ids]), use_cache=False).logits[0]
    ours = oracle_logits(Transformer(config, load(directory), Numerics.EXACT), ids)
    assert torch.allclose(ours, theirs, rtol=0, atol=5e-5)
