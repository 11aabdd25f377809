"""Every kind of damage ends in one CheckpointError that names file, tensor, expected and found."""

import json

import pytest

from dsv4serve.config import ModelConfig
from dsv4serve.types import CheckpointError
from dsv4serve.weights import inventory, verify
from dsv4serve.weights.index import MAX_HEADER_BYTES

TENSOR = "layers.1.attn.wkv.weight"  # F8_E4M3 [128, 128]


def refusal(directory, model):
    with pytest.raises(CheckpointError) as caught:
        verify(directory, model)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def rename(old, new):
    def change(names):
        names[new] = names.pop(old)

    return change


def test_whole_checkpoints_pass(single, sharded, model):
    one, many = verify(single, model), verify(sharded, model)
    assert one.specs == many.specs == inventory(model)
    assert set(one.files.values()) == {"model.safetensors"}
    assert len(set(many.files.values())) > 5
    assert one.num_bytes == sum(spec.num_bytes for spec in inventory(model).values())


def test_missing_tensor(damage, model):
    shard = damage.shard_of(TENSOR)
    damage.edit_header(shard, rename(TENSOR, "layers.1.attn.wkv.weigth"))
    damage.edit_index(rename(TENSOR, "layers.1.attn.wkv.weigth"))
    message = refusal(damage.directory, model)
    assert f"tensor '{TENSOR}' is missing; expected F8_E4M3 [128, 128], found none" in message
    assert ".safetensors" in message


def test_extra_tensor(damage_single, model):
    path = damage_single.shard_of("")
    damage_single.edit_header(path, lambda header: header.update(extra=_empty_entry()))
    message = refusal(damage_single.directory, model)
    assert "model.safetensors: tensor 'extra' is not part of this model; expected none, found F32 [0]" in message


def test_several_wrong_tensors_are_counted(damage_single, model):
    def change(header):
        header.update(extra=_empty_entry(), other=_empty_entry())

    damage_single.edit_header(damage_single.shard_of(""), change)
    assert "(and 1 more like it)" in refusal(damage_single.directory, model)


def _empty_entry():
    return {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def test_misshapen_tensor(damage, model):
    damage.edit_header(damage.shard_of(TENSOR), lambda header: header[TENSOR].update(shape=[64, 256]))
    message = refusal(damage.directory, model)
    assert (
        f"{damage.shard_of(TENSOR)}: tensor '{TENSOR}': expected F8_E4M3 [128, 128], found F8_E4M3 [64, 256]" in message
    )


def test_wrong_dtype(damage, model):
    damage.edit_header(damage.shard_of(TENSOR), lambda header: header[TENSOR].update(dtype="I8"))
    assert "expected F8_E4M3 [128, 128], found I8 [128, 128]" in refusal(damage.directory, model)


def test_unknown_dtype(damage, model):
    damage.edit_header(damage.shard_of(TENSOR), lambda header: header[TENSOR].update(dtype="F3"))
    assert f"tensor '{TENSOR}': dtype 'F3'; known are BF16" in refusal(damage.directory, model)


@pytest.mark.parametrize("shape", [[-1, -128], [128.0, 128], [True], "128", None, [1 << 60]])
def test_nonsense_shape(damage, model, shape):
    damage.edit_header(damage.shard_of(TENSOR), lambda header: header[TENSOR].update(shape=shape))
    assert f"tensor '{TENSOR}': shape" in refusal(damage.directory, model)


def test_size_that_does_not_fit_dtype_and_shape(damage, model):
    damage.edit_header(damage.shard_of(TENSOR), lambda header: header[TENSOR].update(shape=[128, 127]))
    assert "data_offsets span 16384 bytes; F8_E4M3 [128, 127] needs 16256" in refusal(damage.directory, model)


def test_overlapping_tensors(damage, model):
    def change(header):
        header[TENSOR]["data_offsets"] = [offset + 1 for offset in header[TENSOR]["data_offsets"]]

    damage.edit_header(damage.shard_of(TENSOR), change)
    assert "no gaps or overlaps" in refusal(damage.directory, model)


def test_tensor_in_another_shard_than_the_index_says(damage, model):
    other = damage.shard_of("embed.weight").name
    real = damage.shard_of(TENSOR).name
    damage.edit_index(lambda names: names.update({TENSOR: other}))
    message = refusal(damage.directory, model)
    assert other in message
    assert f"tensor '{TENSOR}': model.safetensors.index.json expects it here, but it is in {real}" in message


def test_tensor_that_the_index_does_not_list(damage, model):
    damage.edit_index(lambda names: names.pop(TENSOR))
    assert f"tensor '{TENSOR}' is not listed in" in refusal(damage.directory, model)


def test_tensor_in_two_shards(damage, model):
    def change(header):
        header["embed.weight"] = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}

    damage.edit_header(damage.shard_of("mtp.0.norm.weight"), change)
    assert "tensor 'embed.weight' is also in" in refusal(damage.directory, model)


@pytest.mark.parametrize("cut", [1, 1000])
def test_truncated_shard(damage, model, cut):
    path = damage.shard_of(TENSOR)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-cut])
    message = refusal(damage.directory, model)
    assert f"{path}: truncated: the header needs {size} bytes, the file has {size - cut}; tensor" in message


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_shard_that_ends_in_its_header(damage, model, size):
    path = damage.shard_of(TENSOR)
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path}: truncated" in refusal(damage.directory, model)


def test_bytes_after_the_data(damage, model):
    path = damage.shard_of(TENSOR)
    path.write_bytes(path.read_bytes() + b"\0")
    assert f"{path}: 1 bytes after the last tensor" in refusal(damage.directory, model)


def test_header_larger_than_allowed_is_not_read(damage_single, model):
    path = damage_single.shard_of("")
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse: takes no disk
    assert f"header of {MAX_HEADER_BYTES + 1} bytes" in refusal(damage_single.directory, model)


@pytest.mark.parametrize("header", [b"{", b"[]", b"\xff\xfe", b'{"a": 1}', b'{"a": {}, "a": {}}', b"[" * 100_000])
def test_header_that_is_no_table_of_tensors(damage_single, model, header):
    path = damage_single.shard_of("")
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert str(path) in refusal(damage_single.directory, model)


def test_missing_shard(damage, model):
    path = damage.shard_of(TENSOR)
    path.unlink()
    assert f"{path}: shard is missing" in refusal(damage.directory, model)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_unreadable_index(damage, model, text):
    damage.index_path.write_text(text)
    assert str(damage.index_path) in refusal(damage.directory, model)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", ".x.safetensors", "x.bin", 3, None]
)
def test_shard_name_outside_the_folder(damage, model, shard):
    damage.edit_index(lambda names: names.update({TENSOR: shard}))
    message = refusal(damage.directory, model)
    assert f"tensor '{TENSOR}' is in {shard!r}; expected a plain file name" in message


def test_no_weights(tmp_path, model):
    assert "expected model.safetensors.index.json or model.safetensors" in refusal(tmp_path, model)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "this is a DeepSeek-V3 checkpoint"),
        ("model.layers.0.self_attn.q_a_proj.weight", "transformers' naming"),
        ("mtp.0.main_proj.weight", "this is a DSpark checkpoint"),
        ("mtp.2.confidence_head.weight", "this is a DSpark checkpoint"),
        ("mtp.1.norm.weight", "this is a DSpark checkpoint"),
    ],
)
def test_relatives_are_named(damage, damage_single, model, name, family):
    damage.edit_index(rename(TENSOR, name))
    assert family in refusal(damage.directory, model)
    damage_single.edit_header(damage_single.shard_of(""), rename(TENSOR, name))
    message = refusal(damage_single.directory, model)
    assert family in message
    assert name in message


def test_a_checkpoint_of_another_size_says_what_differs(sharded, model):
    raw = json.loads((sharded / "config.json").read_text())
    wider = ModelConfig.from_dict({**raw, "vocab_size": 65})
    message = refusal(sharded, wider)
    assert "tensor 'embed.weight': expected BF16 [65, 128], found BF16 [64, 128]" in message
