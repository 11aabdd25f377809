"""Random values that questions are made of: names, made-up words, numbers as text, dates.

A made-up word is held out when its CRC says so: training never draws such a word and probes draw no other, so a probe's
values were never seen in training.
"""

from __future__ import annotations

import random
import zlib
from pathlib import Path


def words(text: str) -> tuple[str, ...]:
    """The words of a text, for tables that are easier to read without quotes."""
    return tuple(text.split())


ONSETS = words("b br c ch cl d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t tr v w z")
VOWELS = words("a e i o u ai ee oo ou")
CODAS = ("", "", "", *words("l m n r s t x ck nd ng rt"))


def _sections() -> dict[str, tuple[str, ...]]:
    text = Path(__file__).with_name("words.txt").read_text(encoding="utf-8")
    parts = [part.split("]", 1) for part in text.split("[")[1:]]
    return {name: tuple(" ".join(body.split()).split(", ")) for name, body in parts}


WORDS = _sections()
GIRLS, BOYS = WORDS["girls"], WORDS["boys"]
NAMES = GIRLS + BOYS
CITIES = words("""
    Paris London Rome Berlin Madrid Vienna Oslo Lisbon Athens Dublin Prague Warsaw Helsinki Tokyo Seoul Delhi Cairo
    Nairobi Lagos Toronto Boston Chicago Denver Seattle Miami Lima Bogota Sydney Melbourne Auckland Munich Hamburg
    Lyon Naples Porto Seville Geneva Zurich Bergen Krakow Osaka Kyoto Mumbai Hanoi Manila Accra Tunis Quito
""")
LAST_NAMES = words("""
    Smith Brown Miller Wilson Moore Taylor Clark Lewis Walker Hall Young King Wright Green Baker Adams Nelson Carter
    Mitchell Turner Parker Collins Edwards Stewart Morris Rogers Cook Bell Cooper Ward Gray Reed Price Long Fox
""")


def held_out(word: str) -> bool:
    """Whether training never shows `word` (one of eight)."""
    return zlib.crc32(word.encode()) % 8 == 0


def made_up(draw: random.Random, unseen: bool = False) -> str:
    """A word of two or three syllables that is no English word, such as "brelton"; held out when `unseen`."""
    while True:
        count = draw.choice((2, 2, 3))
        word = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(count)) + draw.choice(CODAS)
        if held_out(word) == unseen:
            return word


def alike(draw: random.Random, count: int) -> list[str]:
    """Made-up words of the same few syllables: to copy one, more than what stands just before has to be compared."""
    syllables = [draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(max(4, count // 3))]
    codas = [draw.choice(CODAS) for _ in range(3)]
    found: list[str] = []
    while len(found) < count:
        word = "".join(draw.choices(syllables, k=draw.choice((2, 2, 3)))) + draw.choice(codas)
        if not held_out(word):
            found.append(word)
    return found
