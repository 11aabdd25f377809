"""Things to remember: facts that a text or a user states once and that are asked for later, each with its answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tools.demo_model.builders import basics
from tools.demo_model.builders.basics import WORDS
from tools.demo_model.builders.grammar import a

DOORS = ("door", "gate", "safe", "locker", "chest", "box", "vault", "garage", "bike lock", "cabinet")
SYLLABLES = ("ba", "ko", "mi", "ru", "ta", "ze", "lo", "fin", "gar", "pel", "sum", "vik", "dor", "nel", "wis", "ju")


@dataclass(frozen=True)
class Memory:
    """A statement, a question whose answer needs it, the answer, and the value that must be in the answer.

    `topic` says what is asked; two statements of one topic would make the question ambiguous.
    """

    topic: str
    statement: str
    question: str
    answer: str
    value: str


def person(draw: random.Random) -> str:
    """A first name."""
    return draw.choice(WORDS["girls"] + WORDS["boys"])


def digits(draw: random.Random) -> str:
    """A code of three to five digits."""
    return "".join(draw.choice("0123456789") for _ in range(draw.randint(3, 5)))


def password(draw: random.Random) -> str:
    """A word that means nothing."""
    return "".join(draw.choice(SYLLABLES) for _ in range(draw.randint(2, 3)))


def code(draw: random.Random) -> Memory:
    """The code of a door or box."""
    thing, value = f"the {draw.choice(WORDS['colors'])} {draw.choice(DOORS)}", digits(draw)
    question = draw.choice(("What is the code of {}?", "Which code opens {}?", "Tell me the code of {}."))
    statement = f"The code of {thing} is {value}."
    return Memory(thing, statement, question.format(thing), statement, value)


def hidden(draw: random.Random) -> Memory:
    """Where somebody hid something."""
    name, place = person(draw), draw.choice(WORDS["places"])
    thing = f"the {draw.choice(WORDS['colors'])} {draw.choice(WORDS['objects'])}"
    verb, past = draw.choice((("hide", "hid"), ("leave", "left"), ("put", "put")))
    statement = f"{name} {past} {thing} {place}."
    return Memory(f"{name} {thing}", statement, f"Where did {name} {verb} {thing}?", statement, place)


def owned(draw: random.Random) -> Memory:
    """How many of something somebody has."""
    name, animals = person(draw), basics.plural(draw.choice(WORDS["animals"]))
    number = str(draw.randint(2, 99))
    statement = f"{name} has {number} {animals}."
    return Memory(f"{name} {animals}", statement, f"How many {animals} does {name} have?", statement, number)


def secret(draw: random.Random) -> Memory:
    """Somebody's secret word."""
    name, word = person(draw), password(draw)
    statement = f"The secret word of {name} is {word}."
    return Memory(f"{name} word", statement, f"What is the secret word of {name}?", statement, word)


def favorite(draw: random.Random) -> Memory:
    """Somebody's favorite food, color or animal."""
    kind, words = draw.choice((("food", "foods"), ("color", "colors"), ("animal", "animals")))
    name, value = person(draw), draw.choice(WORDS[words])
    value = f"the {value}" if kind == "animal" else value
    statement = f"{name}'s favorite {kind} is {value}."
    return Memory(f"{name} {kind}", statement, f"What is {name}'s favorite {kind}?", statement, value)


def birthday(draw: random.Random) -> Memory:
    """Somebody's birthday."""
    name, day = person(draw), f"{draw.choice(basics.MONTHS)} {draw.randint(1, 28)}"
    statement = f"{name}'s birthday is on {day}."
    return Memory(f"{name} birthday", statement, f"When is {name}'s birthday?", statement, day)


def price(draw: random.Random) -> Memory:
    """What something costs."""
    thing = f"the {draw.choice(WORDS['looks'])} {draw.choice(WORDS['objects'])}"
    value = f"{draw.randint(2, 99)} coins"
    statement = f"The price of {thing} is {value}."
    return Memory(thing, statement, f"How much is {thing}?", statement, value)


NEEDLES: tuple[Callable[[random.Random], Memory], ...] = (code, hidden, owned, secret, favorite, birthday, price)


def needles(draw: random.Random, count: int) -> list[Memory]:
    """Memories of different topics, often several of one kind, so that the question's words decide."""
    makers = NEEDLES if draw.random() < 0.5 else (draw.choice(NEEDLES),)
    found: dict[str, Memory] = {}
    while len(found) < count:
        memory = draw.choice(makers)(draw)
        found.setdefault(memory.topic, memory)
    return list(found.values())


def own(draw: random.Random) -> Memory:
    """Something the user says about himself or herself."""
    kind = draw.randrange(8)
    if kind == 0:
        name = person(draw)
        statement = draw.choice(("My name is {}.", "I am {}.", "Hi, I am {}.", "Hello, my name is {}."))
        question = draw.choice(("What is my name?", "Do you remember my name?", "Who am I?"))
        return Memory("name", statement.format(name), question, f"Your name is {name}.", name)
    if kind == 1:
        animal, name = draw.choice(WORDS["animals"]), person(draw)
        question = draw.choice((f"What is my {animal} called?", f"What is the name of my {animal}?"))
        return Memory(animal, f"I have {a(animal)} named {name}.", question, f"Your {animal} is called {name}.", name)
    if kind == 2:
        age = str(draw.randint(4, 99))
        return Memory("age", f"I am {age} years old.", "How old am I?", f"You are {age} years old.", age)
    if kind == 3:
        sort, words = draw.choice((("food", "foods"), ("color", "colors")))
        value = draw.choice(WORDS[words])
        question = f"What is my favorite {sort}?"
        return Memory(sort, f"My favorite {sort} is {value}.", question, f"Your favorite {sort} is {value}.", value)
    if kind == 4:
        number = digits(draw)
        question = draw.choice(("What was the number?", "Which number did I give you?"))
        return Memory("number", f"Remember the number {number}.", question, f"The number is {number}.", number)
    if kind == 5:
        word = password(draw)
        question = draw.choice(("What is the secret word?", "Tell me the secret word."))
        return Memory("word", f"The secret word is {word}.", question, f"The secret word is {word}.", word)
    if kind == 6:
        thing, color = draw.choice(WORDS["objects"]), draw.choice(WORDS["colors"])
        question = f"What color is my {thing}?"
        return Memory(thing, f"I have {a(color + ' ' + thing)}.", question, f"Your {thing} is {color}.", color)
    place = draw.choice(WORDS["places"])
    return Memory("place", f"I live {place}.", "Where do I live?", f"You live {place}.", place)
