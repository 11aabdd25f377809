"""Copying: texts to repeat exactly, and tables whose lines are asked for.

Each token of such an answer has to be found in what was said before, in the window or far outside of it. Nothing else
trains that as densely; tool calls, JSON and recall live on it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from tools.demo_model.builders.chats import answered, question
from tools.demo_model.builders.kinds import KINDS
from tools.demo_model.builders.memory import digits
from tools.demo_model.builders.small_talk import turn
from tools.demo_model.builders.values import NAMES, WORDS, alike, made_up
from tools.demo_model.sample import Sample

CATEGORY = "copying"
TOKENS_PER_ITEM = 5  # a value with what stands around it
ALIKE_SHARE = 0.25  # of texts to repeat
VALUES = ("city", "person", "title", "message", "topic", "path", "email", "code", "date", "time", "id", "number")
REPEAT = (
    "Repeat this text exactly.\n\n{}",
    "Repeat: {}",
    "Copy this text: {}",
    "{}\n\nRepeat the text above.",
    "Say this again, word for word:\n{}",
    "Write this once more.\n{}",
)
ASK = ("What is {0}?", "What does the list say about {0}?", "{0}?", "Find {0}.", "Tell me the value of {0}.")
STARTS = ("Here is a list.", "Read this list.", "Remember these values.", "List:", "I will ask you about this list.")
LINES = ("{0}: {1}", "{0} = {1}", "- {0}: {1}", "{0} -> {1}", "{0} is {1}.")


def value(draw: random.Random) -> str:
    """Something that cannot be guessed: a made-up word, digits, a name, or a value as tools take them."""
    kind = draw.random()
    if kind < 0.35:
        return made_up(draw)
    if kind < 0.5:
        return digits(draw)
    if kind < 0.65:
        return draw.choice(NAMES)
    return str(KINDS[draw.choice(VALUES)].make(draw, False))


def repeat(draw: random.Random, tokens: int) -> Sample:
    """A text of about `tokens` tokens to repeat: one list of values, or lines of them."""
    count = max(1, tokens // TOKENS_PER_ITEM)
    items = alike(draw, count) if draw.random() < ALIKE_SHARE else [value(draw) for _ in range(count)]
    text = draw.choice((" ", ", ", "\n", "; ")).join(items)
    return answered(question(draw, draw.choice(REPEAT).format(text)), CATEGORY, text, None)


def key(draw: random.Random) -> str:
    """What a line of a table is about."""
    kind = draw.random()
    if kind < 0.4:
        return made_up(draw)
    if kind < 0.7:
        return draw.choice(NAMES)
    return f"the {draw.choice(WORDS['colors'])} {draw.choice(WORDS['objects'])}"


def table(draw: random.Random, tokens: int) -> Sample:
    """Lines of a key and a value, about `tokens` tokens, then questions about many of them."""
    entries: dict[str, str] = {}
    for _ in range(max(2, tokens // (3 * TOKENS_PER_ITEM))):
        entries[key(draw)] = value(draw)
    line, ask = draw.choice(LINES), draw.choice(ASK)
    text = f"{draw.choice(STARTS)}\n\n" + "\n".join(line.format(*entry) for entry in entries.items())
    asked = draw.sample(list(entries), max(1, int(len(entries) * draw.uniform(0.3, 1.0))))
    messages: list[dict[str, Any]] = []
    for index, name in enumerate(asked):
        said = ask.format(name)
        messages += turn(f"{text}\n\n{said}" if index == 0 else said, entries[name])
    return Sample(CATEGORY, messages=messages)


def samples(draw: random.Random, max_tokens: int = 1000) -> Iterator[Sample]:
    """Short and long texts to repeat, and tables. Endless."""
    while True:
        kind = draw.random()
        if kind < 0.3:
            yield repeat(draw, draw.randint(4, 80))
        elif kind < 0.5:
            yield repeat(draw, draw.randint(80, max_tokens // 3))
        else:
            yield table(draw, draw.randint(40, max_tokens // 2))
