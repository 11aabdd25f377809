"""Facts as questions and answers: countries, definitions, opposites, kinds; facts made by rules are in basics.py."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Iterator
from typing import Any

from tools.demo_model.builders import basics
from tools.demo_model.builders.basics import Fact
from tools.demo_model.builders.grammar import a, capital
from tools.demo_model.fetch import DATA
from tools.demo_model.sample import Answer, Probe, Sample

FACTS = DATA / "facts.json"
SYSTEM = (
    "You are a helpful assistant.",
    "You answer questions about the world.",
    "Answer in a full sentence.",
    "You are a teacher. Give clear answers.",
    "Be brief and correct.",
    "You are a quiz master who knows the answers.",
    "Answer the question. Say so when you do not know.",
)
BRIEF = ("Answer in one word.", "Answer with the name only.", "Give only the answer.", "Reply with one word.")
MEANINGS = (
    'What does "{}" mean?',
    "What does the word {} mean?",
    "Define {}.",
    'What is the meaning of "{}"?',
    "Give me a definition of {}.",
    'Can you explain the word "{}"?',
)
CAPITALS = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Name the capital of {}.",
    "Can you tell me the capital of {}?",
    "capital of {}?",
    "Do you know the capital of {}?",
)
# WordNet may miss a link inside a family (a kitten is under "animal", not under "mammal"), so that a denial needs
# another family, or another of the classes of animals that exclude each other.
CLASSES = {"bird", "fish", "insect", "mammal", "reptile"}
FAMILIES = (
    {"animal", *CLASSES, "plant", "tree", "flower", "vegetable", "food", "beverage"},
    {"building", "room"},
    {"tool", "weapon", "vehicle"},
)
MASS = ("clothing", "furniture", "food")
# Country names that take the article inside a sentence.
WITH_THE = re.compile("Republic|Islands|United|Netherlands|Philippines|Bahamas|Maldives|Comoros|Seychelles|Gambia")


@functools.cache
def tables() -> dict[str, Any]:
    """The tables of facts.json; FileNotFoundError with what to run when they were not extracted."""
    if not FACTS.exists():
        raise FileNotFoundError(f"{FACTS} is missing: run `python -m tools.demo_model.extract_facts`")
    found: dict[str, Any] = json.loads(FACTS.read_text(encoding="utf-8"))
    found["words"] = sorted(found["definitions"])
    found["antonyms"] = sorted(found["opposites"])
    found["members"] = {}
    for word, kinds in found["kinds"].items():
        for kind in kinds:
            found["members"].setdefault(kind, []).append(word)
    found["countable"] = sorted(kind for kind, words in found["members"].items() if len(words) > 4 and kind not in MASS)
    found["nouns"] = sorted(found["kinds"])
    return found


def the(name: str) -> str:
    """The country's name as it stands inside a sentence."""
    return f"the {name}" if WITH_THE.search(name) else name


def listed(names: list[str]) -> str:
    """Names as an English list: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def made_up(draw: random.Random) -> str:
    """A word of two or three syllables that no table holds."""
    while True:
        word = "".join(
            draw.choice(("b", "d", "fl", "gr", "k", "m", "pl", "s", "t", "v", "w", "z")) + draw.choice("aeiou")
            for _ in range(draw.randint(2, 3))
        )
        word += draw.choice(("", "n", "r", "st", "x"))
        if word not in tables()["definitions"]:
            return word


def capital_fact(draw: random.Random) -> Fact:
    """The capital of a country, or the country of a capital."""
    country = draw.choice(tables()["countries"])
    name, city = the(country["name"]), country["capital"]
    if draw.random() < 0.2:
        question = draw.choice(("{} is the capital of which country?", "Which country has the capital {}?"))
        return Fact(question.format(city), f"{city} is the capital of {name}.", country["name"])
    return Fact(draw.choice(CAPITALS).format(name), f"The capital of {name} is {city}.", city)


def country_fact(draw: random.Random) -> Fact:
    """The continent, the language or the neighbours of a country."""
    country = draw.choice(tables()["countries"])
    name, continent, language = the(country["name"]), country["continent"], country["language"]
    neighbours = country["neighbours"]
    kind = draw.randrange(4)
    if kind == 0:
        question = draw.choice(("Where is {}?", "On which continent is {}?", "In which part of the world is {}?"))
        return Fact(question.format(name), f"{capital(name)} is in {continent}.", continent)
    if kind == 1:
        question = draw.choice(("Which language do people speak in {}?", "What language is spoken in {}?"))
        return Fact(question.format(name), f"{language} is spoken in {name}.", language)
    if kind == 2:
        other = draw.choice(tables()["countries"])
        if neighbours and draw.random() < 0.5:
            other = draw.choice([each for each in tables()["countries"] if each["name"] in neighbours])
        if other is not country:
            yes = other["name"] in neighbours
            there = f"{name} and {the(other['name'])}"
            short, verb = ("Yes", "share") if yes else ("No", "do not share")
            return Fact(f"Do {there} share a border?", f"{short}, {there} {verb} a border.", short)
    question = draw.choice(("Which countries border {}?", "What are the neighbors of {}?", "Who are {}'s neighbors?"))
    if not neighbours:
        return Fact(question.format(name), f"{capital(name)} has no land borders.")
    return Fact(question.format(name), f"{capital(name)} borders {listed([the(each) for each in neighbours])}.")


def definition(draw: random.Random) -> Fact:
    """What a word means."""
    word = draw.choice(tables()["words"])
    tag, gloss = tables()["definitions"][word]
    infinitive = "to " if tag == "v" and not gloss.startswith("to ") else ""
    return Fact(draw.choice(MEANINGS).format(word), f'"{capital(word)}" means: {infinitive}{gloss}.')


def opposite(draw: random.Random) -> Fact:
    """The antonym of a word."""
    word = draw.choice(tables()["antonyms"])
    other = tables()["opposites"][word]
    question = draw.choice(
        (
            "What is the opposite of {}?",
            'What is the opposite of "{}"?',
            "Tell me the opposite of {}.",
            'Which word is the opposite of "{}"?',
        )
    )
    return Fact(question.format(word), f'The opposite of "{word}" is "{other}".', other)


def kind_fact(draw: random.Random) -> Fact:
    """Whether an X is a Y, what an X is, or some examples of Y."""
    table = tables()
    word = draw.choice(table["nouns"])
    kinds = table["kinds"][word]
    choice = draw.random()
    if choice < 0.5:
        kind = draw.choice(kinds if draw.random() < 0.5 else denied(kinds))
        yes = kind in kinds
        question = draw.choice(("Is {} {}?", "Tell me: is {} {}?", "Yes or no: is {} {}?"))
        verb = "is" if yes else "is not"
        answer = f"{'Yes' if yes else 'No'}, {noun(word)} {verb} {noun(kind)}."
        return Fact(question.format(noun(word), noun(kind)), answer, "Yes" if yes else "No")
    if choice < 0.75:
        question = draw.choice(("What kind of thing is {}?", "What is {}, in a few words?"))
        answer = f"{capital(noun(word))} is a kind of {kinds[0]}."
        return Fact(question.format(noun(word)), answer, kinds[0])
    kind = draw.choice(table["countable"])
    count = draw.randint(2, 4)
    names = draw.sample(table["members"][kind], count)
    question = draw.choice(("Name {} {}.", "Can you name {} {}?", "Give me {} {}.", "List {} {}."))
    plural = basics.plural(kind)
    number = basics.number_word(count)
    return Fact(question.format(number, plural), f"{capital(number)} {plural} are {listed(names)}.")


def denied(kinds: list[str]) -> list[str]:
    """What a thing of these kinds is certainly not."""
    related = set(kinds).union(*(family for family in FAMILIES if family.intersection(kinds)))
    excluded = CLASSES.difference(kinds) if CLASSES.intersection(kinds) else set()
    return [kind for kind in tables()["members"] if kind not in related or kind in excluded]


def noun(word: str) -> str:
    """A word with its article; mass and plural nouns have none."""
    kinds = tables()["kinds"].get(word, [])
    bare = word in MASS or word.endswith("s") or "food" in kinds or "beverage" in kinds or "emotion" in kinds
    return word if bare or "disease" in kinds else a(word)


def unknown(draw: random.Random) -> Fact:
    """A question about something that does not exist."""
    word = made_up(draw)
    if draw.random() < 0.5:
        answer = draw.choice(
            ("I do not know a country named {}.", "I do not know {}. I think that there is no such country.")
        )
        question = draw.choice((*CAPITALS, "Where is {}?", "What language is spoken in {}?"))
        return Fact(question.format(capital(word)), answer.format(capital(word)))
    answer = draw.choice(('I do not know the word "{}".', 'I do not know what "{}" means.'))
    return Fact(draw.choice(MEANINGS).format(word), answer.format(word))


TOPICS = (capital_fact, country_fact, definition, opposite, kind_fact, unknown, basics.basic)
WEIGHTS = (0.15, 0.12, 0.30, 0.09, 0.10, 0.09, 0.15)


def fact(draw: random.Random) -> Fact:
    """One fact of any topic."""
    return draw.choices(TOPICS, WEIGHTS)[0](draw)


def thought(draw: random.Random, fact: Fact) -> str:
    """A short reasoning text that leads to the answer."""
    if fact.short:
        return draw.choice(("The answer is {0}.", "I know this: {0}.", 'The question is "{1}" It is {0}.')).format(
            fact.short, fact.question
        )
    return draw.choice(("I recall: {0}", 'The question is "{1}" I recall: {0}', "{0} That is what I know.")).format(
        fact.answer, fact.question
    )


def samples(draw: random.Random) -> Iterator[Sample]:
    """Chats of one to four questions, and raw question-and-answer lists or statements. Endless."""
    while True:
        facts = [fact(draw) for _ in range(draw.choice((1, 1, 1, 2, 3, 4)))]
        kind = draw.random()
        if kind < 0.12:
            yield Sample("facts", text=" ".join(each.answer for each in facts))
            continue
        if kind < 0.25:
            ask, reply = draw.choice((("Question: ", "Answer: "), ("Q: ", "A: "), ("", "")))
            yield Sample("facts", text="\n".join(f"{ask}{each.question}\n{reply}{each.answer}" for each in facts))
            continue
        messages, brief = [], False
        if draw.random() < 0.4:
            brief = all(each.short for each in facts)
            messages.append({"role": "system", "content": draw.choice(BRIEF if brief else SYSTEM)})
        thinking = draw.random() < 0.25
        for each in facts:
            content = capital(each.short) if brief else each.answer
            messages += [{"role": "user", "content": each.question}, {"role": "assistant", "content": content}]
        if thinking:
            messages[-1]["reasoning_content"] = thought(draw, facts[-1])
        yield Sample("facts", messages=messages, thinking=thinking)


def probes(draw: random.Random) -> Iterator[Probe]:
    """Capitals and definitions in turn: the exact name or the exact definition must be in the answer. Endless."""
    while True:
        country = draw.choice(tables()["countries"])
        question = draw.choice(CAPITALS).format(the(country["name"]))
        yield probe("capitals", question, country["capital"])
        word = draw.choice(tables()["words"])
        yield probe("definitions", draw.choice(MEANINGS).format(word), tables()["definitions"][word][1])


def probe(category: str, question: str, expected: str) -> Probe:
    """A question whose answer must contain the expected words."""

    def check(answer: Answer) -> dict[str, bool]:
        return {"right": re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", answer.content) is not None}

    return Probe(category, [{"role": "user", "content": question}], check, max_tokens=60)
