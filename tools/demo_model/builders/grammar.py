"""Sentence frames with slots: `<a|b>` draws one of the alternatives, `{slot}` asks the state, `{Slot}` capitalises.

Frames and word lists are plain text files of sections: a line `[name]`, then one frame a line or words with commas.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Protocol

FOLDER = Path(__file__).parent
PIECE = re.compile(r"<([^<>]*)>|\{(\w+)\}")
ARTICLE = re.compile(r"\b([Aa])n? (?=(\w+))")
AN_BEFORE_CONSONANT = ("uni", "use", "usu", "eu", "one", "ukulele")  # spelt with a vowel, spoken with a consonant
AN_BEFORE_H = ("hour", "honest", "heir", "honor")


class State(Protocol):
    """What fills the slots of a text."""

    def fill(self, slot: str) -> str:
        """The words for a slot, in lower case unless they are a name."""


def sections(name: str) -> dict[str, list[str]]:
    """The lines of each section of a text file in this folder."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = found.setdefault(line.strip("[]"), [])
        elif line.strip():
            lines.append(line)
    return found


def words(name: str) -> dict[str, list[str]]:
    """The comma-separated words of each section of a text file in this folder."""
    joined = {section: " ".join(lines) for section, lines in sections(name).items()}
    return {section: [word.strip() for word in text.split(",") if word.strip()] for section, text in joined.items()}


def is_an(word: str) -> bool:
    """Whether the indefinite article before `word` is "an"."""
    word = word.lower()
    if word.startswith(AN_BEFORE_H):
        return True
    return word[0] in "aeiou" and not word.startswith(AN_BEFORE_CONSONANT)


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if is_an(noun) else 'a'} {noun}"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


class Frame:
    """A sentence frame, parsed once."""

    def __init__(self, text: str):
        self.pieces: list[str | tuple[str, bool] | list[Frame]] = []
        end = 0
        for match in PIECE.finditer(text):
            self.pieces.append(text[end : match.start()])
            choices, slot = match.groups()
            if slot:
                self.pieces.append((slot.lower(), slot[0].isupper()))
            else:
                self.pieces.append([Frame(choice) for choice in choices.split("|")])
            end = match.end()
        self.pieces.append(text[end:])

    def fill(self, draw: random.Random, state: State) -> str:
        """The sentence, with "a" and "an" as the words that follow ask for."""
        text = self._fill(draw, state)
        return ARTICLE.sub(lambda match: f"{match[1]}n " if is_an(match[2]) else f"{match[1]} ", text)

    def _fill(self, draw: random.Random, state: State) -> str:
        out = []
        for piece in self.pieces:
            if isinstance(piece, str):
                out.append(piece)
            elif isinstance(piece, tuple):
                value = state.fill(piece[0])
                out.append(capital(value) if piece[1] else value)
            else:
                out.append(draw.choice(piece)._fill(draw, state))
        return "".join(out)
