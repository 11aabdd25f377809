"""The demo model's tokenizer: byte-level BPE in the shape of the official tokenizer.json.

    python -m tools.demo_model.tokenizer OUT

trains it on the text that the model will be trained on, rendered as in serving, so that what every prompt repeats
(the preamble of tools, markup, JSON schemas) takes few tokens. The same data give the same files.

Only the most frequent words take the space before them into their token. Every other word has the same tokens wherever
it stands, so that to copy one out of a sentence into JSON or a call is to repeat its tokens. With the usual rule one
made-up word in five was cut at other places behind a quote than behind a space, and such words were copied wrongly
twice as often (docs/lab-notes.md).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv4serve.chat.messages import parse_messages
from dsv4serve.chat.render import render
from dsv4serve.chat.tokenizer import ControlToken, join_texts
from dsv4serve.chat.tools import parse_tools
from tools.demo_model.mix import with_effort
from tools.demo_model.sample import Sample
from tools.demo_model.schedule import CATEGORIES

SEED = 20261123
VOCAB_SIZE = 4096
CONTEXT = 8192  # tokens
SINGLE_DIGITS = r"\p{N}"  # sums are learnt better than with the official groups of up to three
NUM_COMMON = 500  # words that may have a token with the space before them
TEXT_SIZE = 40_000_000  # characters
SHARES = (0.10, 0.20, 0.13, 0.18, 0.08, 0.14, 0.07, 0.03, 0.07)  # of CATEGORIES; not those of training: they may change

# Control tokens of the released vocabulary; software finds them by content. The first three have fixed ids.
SPECIAL = [
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<\uff5c\u2581pad\u2581\uff5c>",
]
END_OF_QUERY = "<\uff5cend_of_query\uff5c>"  # the one other text token that is flagged special
PLAIN = [
    *(f"<\uff5cfim\u2581{part}\uff5c>" for part in ("hole", "begin", "end")),
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
    "<think>",
    "</think>",
    "\uff5cDSML\uff5c",
    *(f"<\uff5c{name}\uff5c>" for name in ("latest_reminder", "action", "query", "authority", "domain", "title")),
    *(f"<\uff5c{name}\uff5c>" for name in ("extracted_url", "read_url")),
]


def common_words(texts: Iterable[str]) -> list[str]:
    """The NUM_COMMON words of small letters that most often stand behind a space, in alphabetical order. Names and
    titles, which are copied, begin with a capital."""
    counts = Counter(word for text in texts for word in re.findall(r" ([a-z]+)(?![^\W\d_])", text))
    return sorted(sorted(counts, key=lambda word: (-counts[word], word))[:NUM_COMMON])


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` tokens with the parts of the official tokenizer.json. RuntimeError when
    `texts` hold too little for so many tokens."""
    words = rf" (?:{'|'.join(common_words(texts))})(?![\p{{L}}\p{{M}}])|[\p{{L}}\p{{M}}]+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SINGLE_DIGITS), "isolated"),
            pre_tokenizers.Split(Regex(words + r"| ?[\p{P}\p{S}]+|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(PLAIN) - 1,
        min_frequency=2,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(content, normalized=False, special=False) for content in PLAIN])
    tokenizer.add_special_tokens([AddedToken(END_OF_QUERY, normalized=False, special=True)])
    if tokenizer.get_vocab_size() != vocab_size or [tokenizer.token_to_id(name) for name in SPECIAL] != [0, 1, 2]:
        raise RuntimeError(f"tokenizer has {tokenizer.get_vocab_size()} tokens; expected {vocab_size}: add text")
    return tokenizer


def tokenizer_config(context: int) -> dict[str, Any]:
    """tokenizer_config.json in official shape; `context` is the longest sequence in tokens."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    bos, eos = ({"__type": "AddedToken", "content": content, **flags} for content in SPECIAL[:2])
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "legacy": True,
        "model_max_length": context,
        "pad_token": eos,
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def rendered(sample: Sample) -> list[str]:
    """The texts of a sample between control tokens, as the tokenizer will see them."""
    if sample.text is not None:
        return [sample.text]
    messages, tools = parse_messages(sample.messages), parse_tools(sample.tools)
    segments = render(messages, sample.thinking, tools=tools, effort=sample.effort)
    return [text for text in join_texts(segments) if not isinstance(text, ControlToken)]


def texts(draw: random.Random, size: int) -> Iterator[str]:
    """About `size` characters of training text, all builders in about the shares of training."""
    for name, share in zip(CATEGORIES, SHARES, strict=True):
        samples = importlib.import_module(f"tools.demo_model.builders.{name}").samples(random.Random(draw.random()))
        written = 0
        while written < share * size:
            for text in rendered(with_effort(next(samples), draw)):
                written += len(text)
                yield text


def write_json(path: Path, value: dict[str, Any]) -> None:
    """One of a checkpoint's JSON files, indented for people."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo model's tokenizer.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder for tokenizer.json and tokenizer_config.json")
    out = parser.parse_args().out
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(list(texts(random.Random(SEED), TEXT_SIZE)), VOCAB_SIZE)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    write_json(out / "tokenizer_config.json", tokenizer_config(CONTEXT))


if __name__ == "__main__":
    main()
