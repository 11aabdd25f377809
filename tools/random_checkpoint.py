"""Makes configs/models/demo: a small random checkpoint in official format with a small tokenizer of its own.

    python -m tools.random_checkpoint configs/models/demo

The same command gives the same bytes. The model is random: it answers in babble, through exactly the code path
(FP8 and FP4 weights, C4 and C128 layers, hash routing, MTP) of the released models.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
from pathlib import Path
from typing import Any

from dsv4serve.config import ModelConfig
from dsv4serve.weights.dummy import dummy_weights
from dsv4serve.weights.export import exported_config, write_checkpoint
from dsv4serve.weights.layout import official_view
from tools.demo_model.tokenizer import END_OF_QUERY, PLAIN, SPECIAL, tokenizer_config, train_tokenizer, write_json

SEED = 20261123
VOCAB_SIZE = 2048
OFFICIAL_DIGITS = r"\p{N}{1,3}"

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 256,
    "index_head_dim": 128,
    "index_n_heads": 4,
    "index_topk": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 5,
    "num_hash_layers": 2,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 2,
    "o_lora_rank": 64,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
    "compress_rope_theta": 160000,
    "compress_ratios": [0, 0, 4, 128, 4, 0],
}


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split("|")]


SUBJECTS = _phrases("""
    the engine|a server|my neighbour|the old river|every reader|a small boat|the teacher|our garden|the compiler|
    a quiet student|the scheduler|winter light|the baker|this page|a traveller|the network|her brother|
    the mountain|one request|the doctor|a curious child|the library|his machine|the market
""")
VERBS = _words("""
    answer carry follow remember open move watch measure build repair change gather send receive explain
    compute finish begin return protect divide arrange discover collect improve compare describe prepare
    support connect
""")
OBJECTS = _phrases("""
    a message|the first number|seven tokens|the long road|some bread and water|an unexpected question|the window|
    every letter|the same story|a list of names|the morning train|two different answers|the memory of a summer|
    a warm coat|the result|an empty table|the music|a simple program|the other side|good advice|the key|
    a new language|the picture|its own shadow
""")
PLACES = _phrases("""
    in the house|near the harbour|before noon|without a sound|on the screen|at the end of the street|
    under the bridge|after the meeting|for a long time|in three steps|between two cities|with great care|
    when it rains|during the night|because nobody asked|as quickly as possible
""")
ADVERBS = _phrases("""
    slowly|often|usually|never|together|again|carefully|almost|perhaps|finally|already|today|tomorrow|clearly|
    suddenly|gently
""")
QUESTIONS = _phrases("""
    What is|Where can I find|Why does|How do you explain|Who has seen|When should we expect|
    Could you tell me about|Please write about
""")
STEMS = _words("""
    light color point form act press order figure state play work paper water sound round field book
    land stand turn hand part number place work week cloud garden test code model data value table cache
    layer index page slot token block
""")
ENDINGS = ["", *_words("s ed ing er less ful ly ness able ment ward like")]


def sentences(count: int, draw: random.Random) -> list[str]:
    """Generated training text for the tokenizer: prose, questions, derived words, numbers, code and JSON."""
    lines = []
    for _ in range(count):
        verb, thing, place = draw.choice(VERBS), draw.choice(OBJECTS), draw.choice(PLACES)
        subject, adverb, word = draw.choice(SUBJECTS), draw.choice(ADVERBS), draw.choice(STEMS) + draw.choice(ENDINGS)
        number = draw.randint(0, 9999)
        lines += [
            f"{subject.capitalize()} will {verb} {thing} {place}.",
            f"{adverb.capitalize()}, {subject} {verb}s {thing}, and then {draw.choice(SUBJECTS)} is {verb}ing {place}.",
            f"{draw.choice(QUESTIONS)} {thing} {place}? I think that {subject} would {adverb} {verb} it.",
            f"The {word} of {number} {draw.choice(STEMS)}s was not {verb}ed; you should {verb} the {word} {adverb}!",
            f'{{"{word}": {number}, "name": "{draw.choice(STEMS)}", "{verb}": [true, false, null]}}',
            f"def {verb}_{draw.choice(STEMS)}({word}, n={number}):\n    for i in range(n):\n        print({word}[i])",
            f"- **{word.capitalize()}**: {verb} `{draw.choice(STEMS)}` ({number} ms)\n",
        ]
    return lines


def write(directory: Path) -> None:
    """Write the whole checkpoint folder."""
    tokenizer = train_tokenizer(sentences(4000, random.Random(SEED)), VOCAB_SIZE, OFFICIAL_DIGITS)
    weights = dummy_weights(ModelConfig.from_dict(exported_config(CONFIG, quantized=True)), SEED)
    # Logit 0 for control tokens: babble of words, with a marker or an end of sentence only once in thousands of tokens.
    for content in itertools.chain(SPECIAL, PLAIN, [END_OF_QUERY]):
        weights["head.weight"][tokenizer.token_to_id(content)] = 0
    write_checkpoint(directory, CONFIG, functools.partial(official_view, weights), quantized=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True}
    generation |= {"temperature": 1.0, "top_p": 1.0, "transformers_version": "4.57.1"}
    write_json(directory / "tokenizer_config.json", tokenizer_config(CONFIG["max_position_embeddings"]))
    write_json(directory / "generation_config.json", generation)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the embedded random checkpoint.", allow_abbrev=False)
    parser.add_argument("directory", type=Path, help="new or empty folder to write")
    write(parser.parse_args().directory)


if __name__ == "__main__":
    main()
