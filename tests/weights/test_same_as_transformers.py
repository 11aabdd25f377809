"""The embedded model is a DeepSeek-V4 that others can load: Hugging Face's implementation computes the same logits."""

import torch
from support.models import oracle_logits
from transformers import AutoModelForCausalLM

from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.cli.main import main
from dsv4serve.config import EngineConfig, ModelConfig, Numerics, default_model
from dsv4serve.model.transformer import Transformer
from dsv4serve.weights import load_weights

TEXT = "Tell me a story about a fox and a lamp. "


def test_transformers_computes_the_logits_of_the_bf16_export(tmp_path):
    assert main(["convert", str(default_model()), str(tmp_path / "bf16"), "--to", "bf16"]) == 0
    ids = ChatTokenizer(default_model()).encode_segments([TEXT * 40])
    config = ModelConfig.load(default_model())
    assert len(ids) > 4 * config.index_topk  # the indexer has to choose
    ours = oracle_logits(
        Transformer(config, load_weights(EngineConfig(model=default_model()), config), Numerics.EXACT), ids
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "bf16", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        logits = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4)
