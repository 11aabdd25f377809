"""The embedded checkpoint: the demo model in official format, with the official control tokens."""

import json

import pytest
from tokenizers import Tokenizer

from dsv4serve.config import ModelConfig, default_model
from dsv4serve.weights import verify
from dsv4serve.weights.export import exported_config
from tools.demo_model.config import CONFIG, model_config

SPECIAL = {
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>": 0,
    "<\uff5cend\u2581of\u2581sentence\uff5c>": 1,
    "<\uff5c\u2581pad\u2581\uff5c>": 2,
}
ORDINARY = [
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
    "<think>",
    "</think>",
    "\uff5cDSML\uff5c",
    "<\uff5cfim\u2581hole\uff5c>",
]


def test_the_embedded_checkpoint_is_the_demo_model_and_small():
    assert json.loads((default_model() / "config.json").read_text()) == exported_config(CONFIG, quantized=True)
    verify(default_model(), model_config())
    assert sum(path.stat().st_size for path in default_model().iterdir()) <= 16_000_000


def test_control_tokens_have_the_official_flags():
    added = {
        token["content"]: token
        for token in json.loads((default_model() / "tokenizer.json").read_text())["added_tokens"]
    }
    assert {content: added[content]["id"] for content in SPECIAL} == SPECIAL
    assert all(added[content]["special"] for content in SPECIAL)
    assert not any(added[content]["special"] for content in ORDINARY)


@pytest.mark.parametrize(
    "text", ["The engine answers.", "x = [1, 22, 4444]\n\n\tend", "na\u00efve \u4f60\u597d \U0001f642", " "]
)
def test_text_survives_the_tokenizer(text):
    tokenizer = Tokenizer.from_file(str(default_model() / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == ModelConfig.load(default_model()).vocab_size
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
