"""The embedded checkpoint: what its one command makes is what is committed, and it can be served and talked to."""

import json
import subprocess
import sys

import pytest
from support.models import GOLDEN, oracle_logits, random_ids
from tokenizers import Tokenizer

from dsv4serve.config import EngineConfig, ModelConfig, Numerics, default_model
from dsv4serve.model.transformer import Transformer
from dsv4serve.weights import load_weights, verify

ROOT = GOLDEN.parents[2]
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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "demo"
    subprocess.run([sys.executable, "-m", "tools.random_checkpoint", directory], cwd=ROOT, check=True)
    return directory


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_the_command_makes_the_committed_files(made, name):
    assert (made / name).read_bytes() == (default_model() / name).read_bytes()


def test_the_command_makes_a_valid_checkpoint_of_the_committed_size(made):
    model = ModelConfig.load(made)
    assert verify(made, model).specs == verify(default_model(), model).specs
    file = "model.safetensors"
    assert (made / file).stat().st_size == (default_model() / file).stat().st_size < 10_000_000
    assert (made / file).stat().st_mode == (made / "config.json").stat().st_mode


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


def test_the_embedded_checkpoint_does_not_end_at_once():
    model = ModelConfig.load(default_model())
    transformer = Transformer(model, load_weights(EngineConfig(model=default_model()), model), Numerics.OFFICIAL)
    logits = oracle_logits(transformer, random_ids(model, 200, 11))
    assert 1.0 < float(logits.std()) < 2.5
    assert model.eos_token_id not in logits.argmax(dim=-1).tolist()
    assert float(logits.softmax(dim=-1)[:, model.eos_token_id].max()) < 0.01
